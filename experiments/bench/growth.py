"""How do analysis, clusters and step grow with the network?

    python experiments/bench/growth.py

Time and memory of each, and the growth exponent in the number of parameters from one network to the next: 1 is linear.
A chain of convs as its width doubles, and CIFAR ResNets as their depth does.  Memory is the peak of what Python, NumPy
and torch hold beyond network, gradients and momentum, in a run of its own.  Draws growth.png.
"""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch
from common import Peak, arguments, in_turns, leave, summary
from matplotlib.figure import Figure
from torch import nn

import csgd
from csgd.models.resnet import CifarResNet

PARTS = ("spaces", "clusters", "step")


def chain(width: int) -> nn.Module:
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def measured(model: nn.Module, repeats: int) -> dict[str, dict[str, float]]:
    example = torch.randn(2, 3, 16, 16)
    spaces = csgd.find_spaces(model, example, trial=False)
    widths = csgd.target_widths(spaces, 5 / 8)
    groups = csgd.param_groups(model, spaces, csgd.cluster(model, spaces, widths, "even"), centri_strength=0.1)
    optimizer = csgd.CSGD(groups, lr=0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    contenders = (
        lambda: csgd.find_spaces(model, example, trial=False),
        lambda: csgd.cluster(model, spaces, widths),
        optimizer.step,
    )
    seconds = in_turns(dict(zip(PARTS, contenders, strict=True)), repeats, warmup=1)
    return {
        part: summary(seconds[part]) | {"bytes": peak_bytes(run)} for part, run in zip(PARTS, contenders, strict=True)
    }


def peak_bytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    with Peak() as tensors:
        run()
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return python + tensors.peak


def main() -> None:
    given = arguments(__doc__)
    torch.set_num_threads(max(given.threads))
    families = {
        "conv chain, width": {n: chain for n in (64, 128, 256, 512, 1024)[: 4 if given.quick else None]},
        "ResNet, depth": {n: resnet for n in (20, 38, 74, 146, 290, 578, 1202)[: 4 if given.quick else None]},
    }
    rows, numbers = [], []
    for family, members in families.items():
        before = None
        for size, make in members.items():
            model = make(size)
            found = {"parameters": sum(p.numel() for p in model.parameters())}
            found |= measured(model, 5)
            row = [family, size, f"{found['parameters']:,}"]
            for part in PARTS:
                for what, one in (
                    ("median", f"{1000 * found[part]['median']:.3g} ms"),
                    ("bytes", f"{found[part]['bytes'] / 1e6:.3g} MB"),
                ):
                    row.append(one + (f", {exponent(before, found, part, what):.2f}" if before else ""))
            rows.append(row)
            numbers.append({"family": family, "size": size} | found)
            before = found
    header = [f"{part}, {what}" for part in PARTS for what in ("time", "memory")]
    leave("growth", given, ("family", "size", "parameters", *header), rows, numbers)
    draw(numbers, given.output / "growth.png")


def resnet(depth: int) -> nn.Module:
    return CifarResNet((depth - 2) // 6, 10)


def exponent(before: dict, after: dict, part: str, what: str) -> float:
    """log of the growth of the time or memory, over log of the growth of the parameters."""
    grown = after["parameters"] / before["parameters"]
    return math.log(after[part][what] / before[part][what]) / math.log(grown)


def draw(numbers: list[dict], path: Path) -> None:
    families = list(dict.fromkeys(one["family"] for one in numbers))
    figure = Figure(figsize=(10, 7), layout="constrained")
    for line, (what, label) in zip(
        figure.subplots(2, len(families), sharex="col"), (("median", "seconds"), ("bytes", "bytes")), strict=True
    ):
        for axes, family in zip(line, families, strict=True):
            members = [one for one in numbers if one["family"] == family]
            parameters = [one["parameters"] for one in members]
            for part in PARTS:
                axes.loglog(parameters, [one[part][what] for one in members], "o-", label=part)
            first = members[0]["step"][what] / parameters[0]
            axes.loglog(parameters, [first * n for n in parameters], color="black", linestyle=":", label="linear")
            axes.set(ylabel=label)
            axes.grid(alpha=0.3)
    for axes, family in zip(figure.axes[: len(families)], families, strict=True):
        axes.set_title(family)
    for axes in figure.axes[len(families) :]:
        axes.set_xlabel("parameters")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

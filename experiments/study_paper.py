"""The comparisons of Ding et al. 2019, small: which clusters, identical or zeroed out, redundant or narrow at once.

    OMP_NUM_THREADS=1 python experiments/study_paper.py run       adds what is missing to study_paper.jsonl
    OMP_NUM_THREADS=1 python experiments/study_paper.py report    the table

Four convs of 16 to 32 filters without batch norm on the digits (8×8), AdamW at 0.003, cosine.  A base network is
trained for ten epochs, and for ten more in which the filters that are to go are led to the mean of their cluster, or
to zero, along one curve, up to three quarters of the steps.  The cut is at the end and exact; no training follows.
Redundant training does so with a wide network from its first step, beside a narrow one that is trained for as long.
"""

import argparse
import copy
import json
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn

import csgd
from csgd.collapse import CURVES
from csgd.data import Data, digits
from csgd.train import accuracy, predict

RESULTS = Path(__file__).with_suffix(".jsonl")
COMMAND = "OMP_NUM_THREADS=1 python experiments/study_paper.py run"
SEEDS, FRACTIONS, EPOCHS, LR, BY = range(5), (0.5, 0.25), 10, 3e-3, 0.75
WIDTHS = (16, 16, 32, 32)
NAMES = {
    "kmeans": "identical: k-means on kernels",
    "even": "identical: even clusters",
    "imbalanced": "identical: one large cluster",
    "zeroed": "zeroed out: the smallest by L1",
    "redundant": "redundant: wide from the start, even clusters",
    "narrow": "narrow from the start",
}


def network(widths: tuple[int, ...]) -> nn.Sequential:
    layers = []
    for inputs, outputs, stride in zip((3, *widths), widths, (1, 1, 2, 1), strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def images(seed: int) -> Data:
    return digits(image_size=8, batch_size=32, shift=1, seed=seed, device=torch.device("cpu"))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), LR)


def trained(
    model: nn.Module, data: Data, epochs: range, optimizer: torch.optim.Optimizer, after: Callable[[int], None] = id
) -> nn.Module:
    """after(t) is called behind step t, which counts from 1."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(epochs) * data.steps_per_epoch)
    step = 0
    for epoch in epochs:
        for batch, labels in data.train_batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
            schedule.step()
            after(step := step + 1)
    return model


def judged(model: nn.Module, data: Data) -> float:
    outputs, labels = predict(model, data)
    return accuracy(outputs, labels)


def made_identical(model: nn.Module, data: Data, epochs: range, fraction: float, method: str, seed: int) -> nn.Module:
    spaces = csgd.find_spaces(model, data.example)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, fraction), method, seed=seed)
    optimizer = adamw(model)
    csgd.Collapse(optimizer, model, spaces, clusters, stop=round(BY * len(epochs) * data.steps_per_epoch))
    trained(model, data, epochs, optimizer)
    csgd.trim(model, spaces, clusters, optimizer)
    return model


def zeroed_out(model: nn.Module, data: Data, epochs: range, fraction: float) -> nn.Module:
    """Filters and biases that are to go are scaled behind each step as a Collapse scales deviations; gradients stay."""
    spaces = csgd.find_spaces(model, data.example)
    widths = csgd.target_widths(spaces, fraction)
    kept = csgd.most_important(spaces, csgd.importance(model, spaces, "l1"), widths)
    stop, curve = round(BY * len(epochs) * data.steps_per_epoch), CURVES["cosine"]

    @torch.no_grad()
    def towards_zero(step: int) -> None:
        factor = curve(step / stop) / curve((step - 1) / stop) if step < stop else 0.0
        for name, stay in kept.items():
            layer = model.get_submodule(name)
            going = sorted(set(range(layer.out_channels)) - set(stay))
            layer.weight[going] *= factor
            layer.bias[going] *= factor

    trained(model, data, epochs, adamw(model), towards_zero)
    before, _ = predict(model, data)
    csgd.drop(model, spaces, kept)
    after, _ = predict(model, data)
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(before, after, strict=True)), "what is zero can go"
    return model


def ways(base: nn.Module, wide: nn.Module, data: Data, fraction: float, seed: int) -> Mapping[str, nn.Module]:
    again, whole = range(EPOCHS, 2 * EPOCHS), range(2 * EPOCHS)
    made = {m: made_identical(copy.deepcopy(base), data, again, fraction, m, seed) for m in list(NAMES)[:3]}
    made["zeroed"] = zeroed_out(copy.deepcopy(base), data, again, fraction)
    made["redundant"] = made_identical(copy.deepcopy(wide), data, whole, fraction, "even", seed)
    narrow = network(tuple(int(width * fraction) for width in WIDTHS))
    made["narrow"] = trained(narrow, data, whole, adamw(narrow))
    return made


def run() -> None:
    done = {(row["seed"], row["fraction"]) for row in rows()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for seed in SEEDS:
        if all((seed, fraction) in done for fraction in FRACTIONS):
            continue
        data = images(seed)
        torch.manual_seed(seed)
        wide = network(WIDTHS)
        base = copy.deepcopy(wide)
        trained(base, data, range(EPOCHS), adamw(base))
        for fraction in (fraction for fraction in FRACTIONS if (seed, fraction) not in done):
            torch.manual_seed(seed)
            after = {way: judged(model, data) for way, model in ways(base, wide, data, fraction, seed).items()}
            row = {"seed": seed, "fraction": fraction, "base": judged(base, data), "after": after}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row | {"commit": commit, "command": COMMAND, "torch": torch.__version__}) + "\n")
            print(row)


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> str:
    found, bases = defaultdict(list), {row["seed"]: row["base"] for row in rows()}
    for row in rows():
        for way, value in row["after"].items():
            found[way, row["fraction"]].append(value)
    lines = [f"| | {' | '.join(f'{fraction:g} of the widths' for fraction in FRACTIONS)} |", "|---|" + "---:|" * 2]
    for way, name in NAMES.items():
        cells = [found[way, fraction] for fraction in FRACTIONS]
        lines.append(f"| {name} | {' | '.join(f'{mean(c):.3f} ± {stdev(c):.3f} ({min(c):.3f})' for c in cells)} |")
    told = f"{mean(bases.values()):.3f} ± {stdev(bases.values()):.3f}"
    return "\n".join([*lines, f"\nMean ± standard deviation (least) of {len(bases)} seeds; base networks {told}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    run() if parser.parse_args().what == "run" else print(report())

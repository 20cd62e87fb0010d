"""What does a step of CSGD cost, beside torch's SGD and beside the dense matrices of the paper?

    python experiments/bench/optimizer_step.py

All filters at 5/8 of their number.  Contenders take turns, three steps each, on copies of one network with the same
gradients, in several processes one after the other: where memory and threads happen to lie differs more between
processes than turns do within one.  The ratio is the median within turns, then over processes, beside its extremes.
"calls" counts operator calls of a step, "extra" what an optimizer holds at its peak beyond weights, gradients and
momentum, as a share of the weights.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from multiprocessing import get_context

import torch
from common import Peak, arguments, in_turns, leave, milliseconds, ratio, summary
from torch.profiler import ProfilerActivity, profile
from torchvision.models import densenet121

import csgd
from csgd.centripetal import decay_matrix, merge_matrix
from csgd.clusters import clustered_tensors
from csgd.models import resnet50, resnet56, vgg16

NETWORKS = {
    "VGG-16": lambda: vgg16(10, 32),
    "ResNet-50": lambda: resnet50(1000),
    "ResNet-56": lambda: resnet56(10),
    "DenseNet-121": densenet121,
}


STEPS = 3  # a turn


class Dense(torch.optim.SGD):
    """The step as published: D = ΓG + ΛW for each kernel, with dense matrices, then SGD."""

    def __init__(self, model, spaces, clusters):
        super().__init__(model.parameters(), 0.01, momentum=0.9, nesterov=True)
        self.matrices = []
        for t in clustered_tensors(model, spaces, clusters):
            if t.merged and isinstance(t.tensor, torch.nn.Parameter) and t.merged[0] == 0:
                _, segments = t.merged
                parts = [(segments == row).nonzero().flatten().tolist() for row in segments.unique()]
                where = dict(dtype=torch.float32, device=t.tensor.device)
                self.matrices.append((t.tensor, merge_matrix(parts, **where), decay_matrix(parts, 1e-4, 0.1, **where)))

    @torch.no_grad()
    def step(self):
        gradients = [p.grad for p, _, _ in self.matrices]
        for p, merge, decay in self.matrices:
            p.grad = (merge @ p.grad.reshape(len(p), -1) + decay @ p.reshape(len(p), -1)).view_as(p)
        super().step()
        for (p, _, _), gradient in zip(self.matrices, gradients, strict=True):
            p.grad = gradient


def contender(kind: str, model, spaces, clusters) -> torch.optim.Optimizer:
    constants = dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    if kind == "CSGD":
        return csgd.CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=0.1, vector_ratio=1.0), 0.01)
    if kind == "dense":
        return Dense(model, spaces, clusters)
    return torch.optim.SGD(model.parameters(), **constants, fused=kind == "SGD, fused")


def steps(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(STEPS):
            optimizer.step()

    return turn


def measured(network: str, threads: Sequence[int], turns: int, device: torch.device) -> dict[str, dict]:
    """For each contender: its operator calls, its extra memory, and the seconds of a step in each turn by threads."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, memory_format=torch.channels_last)
    example = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    spaces = csgd.find_spaces(model, example, trial=False)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8), "even")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizers, found = {}, {}
    for kind in ("CSGD", "SGD", "SGD, fused", "dense"):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        for p in twin.parameters():
            p.grad = torch.randn_like(p)
        with Peak() as peak:
            optimizers[kind] = contender(kind, twin, spaces, clusters)
            optimizers[kind].step()
            optimizers[kind].step()
        with profile(activities=[ProfilerActivity.CPU]) as events:
            optimizers[kind].step()
        calls = sum(event.name.startswith("aten::") for event in events.events())
        found[kind] = {"calls": calls, "extra": peak.peak / weights - 1, "seconds": {}}  # 1: the momentum
    for number in threads:
        torch.set_num_threads(number)
        seconds = in_turns({kind: steps(optimizer) for kind, optimizer in optimizers.items()}, turns)
        for kind, of_turns in seconds.items():
            found[kind]["seconds"][number] = [one / STEPS for one in of_turns]
    return found


def main() -> None:
    given = arguments(__doc__)
    turns, processes = (5, 1) if given.quick else (9, 7)
    rows, numbers = [], []
    for network in list(NETWORKS)[: 2 if given.quick else None]:
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
            tasks = [fresh.submit(measured, network, given.threads, turns, given.device) for _ in range(processes)]
            found = [task.result() for task in tasks]
        for threads, kind in product(given.threads, found[0]):
            seconds = [one[kind]["seconds"][threads] for one in found]
            ratios = [ratio(own, one["SGD"]["seconds"][threads]) for own, one in zip(seconds, found, strict=True)]
            of_steps, to_sgd = list(chain(*seconds)), statistics.median(ratios)
            calls, extra = found[0][kind]["calls"], found[0][kind]["extra"]
            rows.append(
                (network, threads, kind, milliseconds(of_steps), f"{to_sgd:.2f}",
                 f"{min(ratios):.2f} … {max(ratios):.2f}", calls, f"{extra:.0%}")
            )  # fmt: skip
            numbers.append(
                {"network": network, "threads": threads, "contender": kind, "seconds": summary(of_steps),
                 "processes": processes, "to_sgd": to_sgd, "lowest": min(ratios), "highest": max(ratios),
                 "calls": calls, "extra": extra}
            )  # fmt: skip
    header = ("network", "threads", "optimizer", "ms (quartiles)", "to SGD", "processes", "calls", "extra")
    leave("optimizer_step", given, header, rows, numbers)


if __name__ == "__main__":
    main()

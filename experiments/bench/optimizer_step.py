"""What does a step of CSGD cost, beside torch's SGD and beside the dense matrices of the paper?

    python experiments/bench/optimizer_step.py

All filters at 5/8 of their number.  Contenders take turns, three steps each, on copies of one network with the same
gradients; the ratio is the median within turns.  "calls" counts operator calls of a step, "extra" what an optimizer
holds at its peak beyond weights, gradients and momentum, as a share of the weights.
"""

import copy
from collections.abc import Callable

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


def main() -> None:
    given = arguments(__doc__)
    rows, numbers = [], []
    for network, make in list(NETWORKS.items())[: 2 if given.quick else None]:
        torch.manual_seed(0)
        model = make().to(given.device, memory_format=torch.channels_last)
        example = torch.randn(2, 3, 64, 64, device=given.device).contiguous(memory_format=torch.channels_last)
        spaces = csgd.find_spaces(model, example)
        clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 5 / 8), "even")
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        optimizers, calls, extra = {}, {}, {}
        for kind in ("CSGD", "SGD", "SGD, fused", "dense"):
            twin = copy.deepcopy(model)
            torch.manual_seed(1)
            for p in twin.parameters():
                p.grad = torch.randn_like(p)
            with Peak() as peak:
                optimizers[kind] = contender(kind, twin, spaces, clusters)
                optimizers[kind].step()
                optimizers[kind].step()
            extra[kind] = peak.peak / weights - 1  # momentum
            with profile(activities=[ProfilerActivity.CPU]) as events:
                optimizers[kind].step()
            calls[kind] = sum(event.name.startswith("aten::") for event in events.events())
        for threads in given.threads:
            torch.set_num_threads(threads)
            repeats = 7 if given.quick else 25
            seconds = in_turns({kind: steps(optimizer) for kind, optimizer in optimizers.items()}, repeats)
            seconds = {kind: [one / STEPS for one in turns] for kind, turns in seconds.items()}
            for kind in optimizers:
                to_sgd = ratio(seconds[kind], seconds["SGD"])
                rows.append(
                    (network, threads, kind, milliseconds(seconds[kind]), f"{to_sgd:.2f}", calls[kind],
                     f"{extra[kind]:.0%}")
                )  # fmt: skip
                numbers.append(
                    {"network": network, "threads": threads, "contender": kind, "seconds": summary(seconds[kind]),
                     "to_sgd": to_sgd, "calls": calls[kind], "extra": extra[kind]}
                )  # fmt: skip
    header = ("network", "threads", "optimizer", "ms (quartiles)", "to SGD", "calls", "extra")
    leave("optimizer_step", given, header, rows, numbers)


if __name__ == "__main__":
    main()

"""C-SGD filter by filter, as the paper writes it: slow, readable, and the measure of the fast path."""

import torch
from torch import Tensor


class ReferenceCSGD:
    """One tensor W whose rows lie along `dim`.

    For a filter j of cluster H: ΔF_j = −τ ( Σ_{k∈H} ∂L/∂F_k / |H| + η F_j + ε (F_j − Σ_{k∈H} F_k / |H|) ), through
    momentum μ and Nesterov's look-ahead.
    """

    def __init__(self, weight: Tensor, dim: int, clusters, eta, eps, lr, momentum, nesterov):
        self.weight, self.dim, self.clusters = weight.clone(), dim, clusters
        self.eta, self.eps, self.lr, self.momentum, self.nesterov = eta, eps, lr, momentum, nesterov
        self.buffer = torch.zeros_like(weight)

    def step(self, gradient: Tensor) -> None:
        rows, grads = self.weight.movedim(self.dim, 0), gradient.movedim(self.dim, 0)
        direction = torch.empty_like(self.weight)
        for members in self.clusters:
            mean_gradient = sum(grads[k] for k in members) / len(members)
            mean_filter = sum(rows[k] for k in members) / len(members)
            for j in members:
                pull = self.eps * (rows[j] - mean_filter)
                direction.movedim(self.dim, 0)[j] = mean_gradient + self.eta * rows[j] + pull
        self.buffer = self.momentum * self.buffer + direction
        update = direction + self.momentum * self.buffer if self.nesterov else self.buffer
        self.weight = self.weight - self.lr * update


def random_partition(size: int, width: int, generator: torch.Generator) -> list[list[int]]:
    order = torch.randperm(size, generator=generator).tolist()
    parts = [[slot] for slot in order[:width]]
    for slot in order[width:]:
        parts[int(torch.randint(width, (1,), generator=generator))].append(slot)
    return parts


def segments_of(clusters: list[list[int]]) -> Tensor:
    segments = torch.empty(sum(map(len, clusters)), dtype=torch.long)
    for members in clusters:
        segments[members] = members[0]
    return segments

"""Label tensors: every scalar of an activation names the channel it belongs to.

A label tensor has the shape of the activation that it shadows and holds integer *atoms*, one per channel.
Dims along which labels do not change are stored with stride 0, so a label tensor costs as much memory as
the activation has channels, and `wide_dims` tells where the channels are.
"""

import torch
from torch import Tensor


class UnionFind:
    """Disjoint sets of atoms, united and looked up by whole tensors."""

    def __init__(self):
        self._parent = torch.empty(0, dtype=torch.long, device="cpu")

    def __len__(self) -> int:
        return len(self._parent)

    def grow(self, n: int) -> None:
        """Adds n sets of one atom each."""
        self._parent = torch.cat([self._parent, torch.arange(len(self), len(self) + n, device="cpu")])

    def find(self, atoms: Tensor) -> Tensor:
        """The representative (smallest atom) of each atom's set; the shape of `atoms`."""
        if atoms.numel() > len(self):  # labels of many entries: look up all atoms once, then each entry once
            while not torch.equal(above := self._parent[self._parent], self._parent):
                self._parent = above
            return self._parent[atoms]
        root = self._parent[atoms]
        while not torch.equal(above := self._parent[root], root):
            root = above
        return root

    def union(self, a: Tensor, b: Tensor) -> None:
        """Unites the sets of a[i] and b[i] for every i."""
        a, b = a.reshape(-1), b.reshape(-1)
        if torch.equal(a, b):  # as most are: a pass in another mode says the same again
            return
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            # Parents only ever become smaller, so no cycle can arise whatever the order of the writes.
            self._parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")


def compact(labels: Tensor) -> Tensor:
    """Labels without repetition: every dim of stride 0 becomes a dim of size 1."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def wide_dims(labels: Tensor) -> list[int]:
    """The dims along which labels differ."""
    return [dim for dim, size in enumerate(compact(labels).shape) if size > 1]


def fold_constant_dims(labels: Tensor) -> Tensor:
    """The same labels (same shape), each dim along which they do not change stored with stride 0."""
    shape, labels = labels.shape, compact(labels)
    for dim in wide_dims(labels):
        first = labels.narrow(dim, 0, 1)
        if torch.equal(labels, first.expand_as(labels)):
            labels = first
    return labels.expand(shape)


def along(atoms: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector of atoms as a label tensor of `ndim` dims that varies along `dim` alone."""
    return atoms.view([-1 if d == dim else 1 for d in range(ndim)])

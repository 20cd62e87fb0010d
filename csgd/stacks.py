"""Tensors whose rows have one length, as one matrix: their clusters are merged in few operations."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from csgd.centripetal import RowOrder, Segments, merged_gradient, permuted, squared_deviation

STACKED = 2**17  # entries: small tensors share an operation until they have as many, larger ones are worth one each
KEPT = 64  # sets of tensors that came together, the latest: blocks left out at random make many

T = TypeVar("T")
Clustered = tuple[Tensor, int, Tensor]  # a tensor, the dim of its rows, and their segments
Memory = dict[tuple[torch.device, torch.dtype], Tensor]  # a fresh allocation costs more than the sums


@dataclass(frozen=True)
class _Bench:
    """Memory in which the tensors of a stack are merged.

    dim     along which they are put together
    whole   as they are put together;  rows  the same memory as a matrix [c, k]
    merged  rows after the merge [c, k];  parts  these in the shapes of the tensors
    """

    dim: int
    whole: Tensor
    rows: Tensor
    merged: Tensor
    parts: Sequence[Tensor]

    @classmethod
    def of(cls, memory: Tensor, orders: Sequence[RowOrder]) -> "_Bench":
        counts = [order.shape[0] for order in orders]
        shape, back = (sum(counts), *orders[0].shape[1:]), orders[0].back
        whole, merged = (half[: math.prod(shape)].view(shape) for half in memory.chunk(2))
        parts = [permuted(part, back) for part in merged.split(counts)]
        return cls(orders[0].dims[0], permuted(whole, back), whole.view(shape[0], -1), merged.view(shape[0], -1), parts)


@dataclass(frozen=True)
class Stack:
    """Tensors whose rows have one shape and layout, type and device, seen as one matrix [c, k].

    segments  the clusters of all rows
    bench     where several tensors are merged; those that are alone are merged where they are
    """

    tensors: list[Tensor]
    orders: list[RowOrder]
    segments: Segments
    bench: _Bench | None

    @classmethod
    def of(cls, clustered: Sequence[Clustered], memory: Memory | None) -> "Stack":
        tensors, dims, segments = zip(*clustered, strict=True)
        first = accumulate((len(vector) for vector in segments), initial=0)
        joint = torch.cat([vector.cpu() + rows for vector, rows in zip(segments, first, strict=False)])
        where = device, dtype = tensors[0].device, tensors[0].dtype
        orders = [RowOrder.of(tensor, dim) for tensor, dim in zip(tensors, dims, strict=True)]
        bench = None
        if memory is not None and len(tensors) > 1:
            if where not in memory:
                memory[where] = torch.empty(2 * STACKED, device=device, dtype=dtype)
            bench = _Bench.of(memory[where], orders)
        return cls(list(tensors), orders, Segments.of(joint, device, dtype), bench)

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    def matrices(self, values: Iterable[Tensor]) -> list[Tensor]:
        """One value for each tensor, of its shape → its rows [c_i, k]"""
        return [order.rows(value) for order, value in zip(self.orders, values, strict=True)]

    def merge_(self, values: Sequence[Tensor], left: float = 0.0) -> None:
        """W ← ΓW + left · (W − ΓW) in place, of one value for each tensor; members are equal to the bit if `left` is 0.

        Rows that are alone stay.  Means are summed row after row, never by atomics (fact F10).
        """
        block = permuted(values[0], self.orders[0].dims)
        if len(values) == 1 and block.is_contiguous():
            rows = block.view(len(block), -1)
            if left:
                torch.lerp(self.segments.merge(rows), rows, left, out=rows)
            else:
                self.segments.merge(rows, out=rows)
            return
        bench = self.bench or _Bench.of(values[0].new_empty(2 * self.size), self.orders)
        torch.cat(values, bench.dim, out=bench.whole)
        self.segments.merge(bench.rows, out=bench.merged)
        if left:
            bench.merged.lerp_(bench.rows, left)
        torch._foreach_copy_(values, bench.parts)

    def deviation(self, values: Sequence[Tensor]) -> Tensor:
        """Σ‖W − ΓW‖² of one value for each tensor, a scalar tensor on the device."""
        matrices = self.matrices(values)
        return squared_deviation(matrices[0] if len(matrices) == 1 else torch.cat(matrices), self.segments)

    def merged_gradients(self, centri_strength: float, scratch: Tensor) -> list[Tensor]:
        """Γ(G − εW) of each parameter W with its gradient G, its dims in the order of its RowOrder, in `scratch`."""
        gradients, weights = self.matrices(p.grad for p in self.tensors), self.matrices(self.tensors)
        out = scratch[: self.size].view(-1, weights[0].size(1))
        merged_gradient(gradients, weights, self.segments, centri_strength, out)
        parts = out.split([order.shape[0] for order in self.orders])
        return [part.view(order.shape) for part, order in zip(parts, self.orders, strict=True)]


def stacks_of(clustered: Iterable[Clustered], memory: Memory | None = None) -> list[Stack]:
    """Stacks of at most `STACKED` entries, or of one tensor; `memory` is what they share, if they are to be merged."""
    alike = defaultdict(list)
    for one in clustered:
        order = RowOrder.of(*one[:2])
        alike[order.dims, order.shape[1:], one[0].device, one[0].dtype].append(one)
    return [Stack.of(piece, memory) for some in alike.values() for piece in _split(some)]


def _split(clustered: Sequence[Clustered]) -> Iterator[list[Clustered]]:
    piece, size = [], 0
    for one in clustered:
        if piece and size + one[0].numel() > STACKED:
            yield piece
            piece, size = [], 0
        piece.append(one)
        size += one[0].numel()
    yield piece


class Latest(dict[Hashable, T]):
    """What was made for each of the latest `KEPT` keys."""

    def of(self, key: Hashable, make: Callable[[], T]) -> T:
        found = self.pop(key) if key in self else make()
        if len(self) >= KEPT:
            del self[next(iter(self))]
        self[key] = found  # the latest comes last
        return found

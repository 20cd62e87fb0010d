"""The equations of Centripetal SGD (Ding et al., CVPR 2019) on tensors and numbers.

A tensor W is seen as a matrix of one row per channel (c rows of k entries), G is the gradient of the loss, η the weight
decay, ε the centripetal strength, τ the learning rate, μ the momentum, H(j) the cluster of row j.  Rows that become
equal may lie along any dim; the `segments` of a tensor are a vector [c] with, for each position, the position of the
representative of its cluster.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from numbers import Real

import torch
from torch import Tensor


def merge_matrix(clusters: Sequence[Sequence[int]], *, dtype=torch.float64, device=None) -> Tensor:
    """Merge matrix Γ [c, c]: Γ[i,j] = 1/|H(i)| if j ∈ H(i), else 0.  ΓW holds the cluster means (section 3.2, eq. 8).

    `clusters` is a partition of range(c).  Dense: for reading and as the oracle of `merged_gradient`.
    """
    size = sum(map(len, clusters))
    merge = torch.zeros(size, size, dtype=dtype, device=device)
    for members in clusters:
        rows = torch.tensor(members, device=device)
        merge[rows[:, None], rows] = 1 / len(members)
    return merge


def decay_matrix(
    clusters: Sequence[Sequence[int]], weight_decay: float, centri_strength: float, *, dtype=torch.float64, device=None
) -> Tensor:
    """Decay matrix Λ = ηI + ε(I − Γ) [c, c] (section 3.2, eq. 9).  The C-SGD direction is ΓG + ΛW."""
    merge = merge_matrix(clusters, dtype=dtype, device=device)
    identity = torch.eye(len(merge), dtype=dtype, device=device)
    return weight_decay * identity + centri_strength * (identity - merge)


@dataclass(frozen=True)
class Segments:
    """The clusters of the rows of a matrix: Γ, sparse.

    order    [c] positions of the rows, cluster after cluster
    offsets  [r] where in `order` each cluster begins
    cluster  [c] number of the cluster of each row, 0 … r − 1
    weights  [c] of each row in `order` one over the number of rows of its cluster
    """

    order: Tensor
    offsets: Tensor
    cluster: Tensor
    weights: Tensor

    @classmethod
    def of(cls, segments: Tensor, device=None, dtype=torch.float64) -> "Segments":
        """From a vector that names one row, any, for each cluster; for rows of `dtype`."""
        _, cluster, sizes = segments.cpu().unique(return_inverse=True, return_counts=True)
        order = cluster.argsort(stable=True)
        tensors = order, sizes.cumsum(0) - sizes, cluster, (1 / sizes.double())[cluster][order].to(dtype)
        return cls(*(tensor.to(device) for tensor in tensors))

    @property
    def shared(self) -> bool:
        """Whether any cluster has two members."""
        return len(self.offsets) < len(self.cluster)

    def means(self, rows: Tensor) -> Tensor:
        """Cluster means [r, k] of rows [c, k].

        Summed row after row, never by atomics: the same bits on every run and every rank (fact F10).
        """
        # 0: sums; means, mode 1, come along a slower path, and a division of the sums takes as long as they do.
        return torch.embedding_bag(rows, self.order, self.offsets, mode=0, per_sample_weights=self.weights)[0]

    def merge(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """ΓW of rows [c, k]: each is replaced by the mean of its cluster; a row that is alone stays, bit by bit."""
        return torch.index_select(self.means(rows), 0, self.cluster, out=out)


def merged_gradient(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    segments: Segments,
    centri_strength: float,
    out: Tensor | None = None,
) -> Tensor:
    """Γ(G − εW) [c, k]: the gradient with which SGD under a weight decay of η+ε is C-SGD (eq. 7).

    Γ(G − εW) + (η+ε)W = ΓG + ΛW.  G and W are rows in several tensors [c_i, k], one below the other.  Rows of a
    cluster get the same bits, and only means [r, k] are computed.
    """
    if len(weights) == 1:
        out = torch.sub(gradients[0], weights[0], alpha=centri_strength, out=out)
    else:
        out = torch.cat(gradients, out=out)
        torch._foreach_sub_(out.split([rows.size(0) for rows in weights]), weights, alpha=centri_strength)
    return segments.merge(out, out=out)


def squared_deviation(weight: Tensor, segments: Segments) -> Tensor:
    """Deviation ‖W − ΓW‖² of rows [c, k], as a scalar tensor; 0 where members are equal to the bit."""
    away = weight - weight.index_select(0, segments.order[segments.offsets][segments.cluster])
    return segments.merge(away).sub_(away).square_().sum()


@dataclass(frozen=True)
class RowOrder:
    """How a tensor of some shape and strides becomes a matrix of rows, without a copy where memory allows it.

    dims   its dims, that of the rows first, the others from the largest stride to the smallest;  back  undoes them
    shape  its sizes along these
    """

    dims: tuple[int, ...]
    back: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, dim: int) -> "RowOrder":
        dims = (dim, *(d for d in memory_order(tensor) if d != dim))
        return cls(dims, inverse(dims), tuple(tensor.size(d) for d in dims))

    def rows(self, tensor: Tensor) -> Tensor:
        """tensor → [c, k]"""
        return permuted(tensor, self.dims).reshape(self.shape[0], -1)

    def tensor(self, rows: Tensor) -> Tensor:
        """[c, k] → a view in the shape of the tensor"""
        return permuted(rows.view(self.shape), self.back)


def segment_mean(tensor: Tensor, dim: int, segments: Tensor) -> Tensor:
    """ΓW along `dim`: every row replaced by the mean of its cluster; equal rows stay, bit by bit.

    `segments` holds the position of the representative, around which rows are averaged.  Of integers, which have no
    mean, every row becomes its representative.
    """
    if tensor.is_complex():
        return torch.view_as_complex(segment_mean(torch.view_as_real(tensor), dim, segments))
    first = tensor.index_select(dim, segments.to(tensor.device))
    if not tensor.is_floating_point():
        return first
    away = torch.where(tensor == first, 0, tensor - first)  # also where both are infinite
    order = RowOrder.of(away, dim)
    means = Segments.of(segments, tensor.device, tensor.dtype).merge(order.rows(away))
    return laid_out_like(first + order.tensor(means), tensor)


def one_of_each(tensor: Tensor, dim: int, segments: Tensor, *, mean: bool) -> Tensor:
    """One row for each cluster along `dim`, in the order of the representatives, laid out as `tensor`: the mean of its
    members, or their sum.

    The mean is taken around the representative, w_1 + Σ_j (w_j − w_1) / |H|: equal rows stay, bit by bit.  Of integers,
    which have no mean, it is the representative.
    """
    device, order = tensor.device, memory_order(tensor)
    tensor = tensor.cpu()  # where sums have an order, the same on every rank (fact F10)
    if dim == 1 and tensor.shape[2:].numel() == 1:  # columns of a matrix: quicker as rows of a transposed copy
        out = one_of_each(tensor.flatten(1).t().contiguous(), 0, segments, mean=mean).t().contiguous()
        return laid_out(out.view(*out.shape, *tensor.shape[2:]), order).to(device)
    kept = representatives(segments)
    members = (segments != torch.arange(len(segments), device="cpu")).nonzero().flatten()
    out = tensor.index_select(dim, kept)
    if len(members) and (tensor.is_floating_point() or tensor.is_complex() or not mean):
        rows = tensor.index_select(dim, members)
        if mean:
            first = tensor.index_select(dim, segments[members])
            share = (1 / segments.bincount().double())[segments[members]].to(tensor.dtype)
            if torch.equal(rows, first):
                return laid_out(out, order).to(device)
            alike = rows == first
            rows.sub_(first).masked_fill_(alike, 0)  # also where both are infinite
            rows.mul_(share.view([-1] + [1] * (tensor.dim() - dim - 1)))
        out.index_add_(dim, torch.searchsorted(kept, segments[members]), rows)
    return laid_out(out, order).to(device)


def laid_out(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """A tensor whose dims lie in memory from the first to the last of `order`."""
    return tensor.permute(order).contiguous().permute(inverse(order))


def representatives(segments: Tensor) -> Tensor:
    """The positions that stand for themselves."""
    return (segments == torch.arange(len(segments), device="cpu")).nonzero().flatten()


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Its dims from the largest stride to the smallest: along these, a dense tensor is contiguous."""
    dims = range(tensor.dim())
    return tuple(dims) if tensor.is_contiguous() else tuple(sorted(dims, key=lambda d: -tensor.stride(d)))


def inverse(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `dims`."""
    return tuple(dims.index(d) for d in range(len(dims)))


def permuted(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """tensor.permute(dims), without a call into torch where that changes nothing."""
    return tensor if dims == (0, 1, 2, 3)[: len(dims)] else tensor.permute(dims)


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` with the strides of `other`, of the same shape; those of dims of one entry mean nothing."""
    if tensor.stride() == other.stride():
        return tensor
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    alike = all(size == 1 or a == b for size, a, b in strides)
    return tensor if alike else torch.empty_like(other).copy_(tensor)


def scale_along(tensor: Tensor, factors: Sequence[tuple[int, Tensor]]) -> Tensor:
    """A copy of `tensor` multiplied by a vector along each of some dims: Π_d factors_d[i_d] · t[i_1, i_2, …] (F7)."""
    vectors = [vector.view([-1 if d == dim else 1 for d in range(tensor.dim())]) for dim, vector in factors]
    return tensor * math.prod(vectors[1:], start=vectors[0])  # one pass over the tensor: the product is small


def forecast(
    learning_rates: Sequence[float],
    centri_strength: float | Sequence[float],
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = True,
) -> list[float]:
    """The factors a_t by which every deviation V = (I − Γ)W will have shrunk after each step: V_t = a_t V_0 (fact F2).

    b ← μb + (η+ε)a,  a ← a − τ((η+ε)a + μb) with Nesterov or a − τb without; a_0 = 1, b_0 = 0.  Neither the data
    nor the gradients enter, so the step of the collapse is known before the run.  τ, and ε if it is a sequence, are
    those of each step.
    """
    strengths = repeat(centri_strength) if isinstance(centri_strength, Real) else centri_strength
    a, b, factors = 1.0, 0.0, []
    for rate, strength in zip(learning_rates, strengths, strict=False):
        pull = weight_decay + strength
        b = momentum * b + pull * a
        a -= rate * (pull * a + momentum * b if nesterov else b)
        factors.append(a)
    return factors


def collapse_step(factors: Sequence[float], tolerance: float, statistics_momentum: float | None = None) -> int | None:
    """The number of steps after which |a_t| stays within `tolerance`; None if that is not within the run.

    With the momentum of batch norm's running statistics, these too: they lag the filters as a running mean (fact F8).
    """
    last, lagging = 0, 1.0
    for step, factor in enumerate(map(abs, factors), 1):
        if statistics_momentum is not None:
            lagging += statistics_momentum * (factor - lagging)
            factor = max(factor, lagging)
        if not factor <= tolerance:
            last = step
    return last + 1 if last < len(factors) else None


def stability_limit(momentum: float, nesterov: bool) -> float:
    """The bound that τ(η+ε) must stay below: 2(1+μ), with Nesterov 2(1+μ)/(1+2μ) (fact F6)."""
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def strength_to_collapse(
    learning_rates: Sequence[float],
    tolerance: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = True,
    *,
    ramp: Sequence[float] | None = None,
    within: int | None = None,
    statistics_momentum: float | None = None,
) -> float | None:
    """The smallest strength ε that collapses within `within` steps, or the whole run; None if no stable one does (F4).

    `ramp` holds the factor of ε at each step.
    """
    ramp = [1.0] * len(learning_rates) if ramp is None else ramp
    within = len(learning_rates) if within is None else within

    def collapses(strength: float) -> bool:
        factors = forecast(learning_rates, [strength * r for r in ramp], weight_decay, momentum, nesterov)
        step = collapse_step(factors, tolerance, statistics_momentum)
        return step is not None and step <= within

    fastest = max((rate * r for rate, r in zip(learning_rates, ramp, strict=True)), default=0.0)
    if fastest <= 0:
        return None
    if collapses(0.0):
        return 0.0
    highest = stability_limit(momentum, nesterov) / fastest - weight_decay
    low, high = 0.0, highest * 2.0**-30
    while not collapses(high):  # from below: close to the limit the recurrence rings and is no longer monotonic
        low, high = high, high * 1.3
        if high >= highest:
            return None
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if collapses(middle) else (middle, high)
    return high


def lengthening(left: float, tolerance: float) -> float:
    """How many times longer a run must be for the factor `left` at its end to become `tolerance`."""
    left = abs(left)
    return math.inf if left >= 1 else 1.0 if left <= tolerance else math.log(tolerance) / math.log(left)

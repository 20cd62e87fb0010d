"""Clusters: which filters of a channel space become one, as plain {space name: [[slot, ...], ...]}."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csgd.balanced import balanced
from csgd.centripetal import laid_out, memory_order, one_of_each, representatives, scale_along, segment_mean
from csgd.errors import InputError
from csgd.graph import ChannelSpace, Ref, conditions
from csgd.graph.integers import Integers, at_place, replaced
from csgd.graph.kernels import norms
from csgd.graph.twin import dotted
from csgd.outputs import output_rows

Clusters = Mapping[str, Sequence[Sequence[int]]]
METHODS = ("kmeans", "even", "imbalanced")
SOURCES = ("pacesetter", "producers", "outputs")
STARTS = 3  # of k-means, the best of which counts: seeds then matter little


def cluster(
    model: nn.Module,
    spaces: list[ChannelSpace],
    widths: Mapping[str, int],
    method: str = "kmeans",
    seed: int = 0,
    of: str = "pacesetter",
    *,
    data: Iterable[Any] | None = None,
) -> dict[str, list[list[int]]]:
    """Partitions the slots of each space into `widths[name]` clusters; the first slot of each is the one kept.

    kmeans      k-means on the flattened kernels, of the pacesetter (section 3.2) or of all producers: see `filters`; or
                of="outputs", on what they put out on `data`, a few batches, each as the network is called with it: the
                expected squared distance of two channels, see `csgd.outputs`
    even        contiguous runs of near-equal size
    imbalanced  one cluster of size − width + 1, the rest singletons

    Where a condition of the space asks for clusters of one size, k-means makes such clusters, and both other methods
    contiguous runs.  InputError where the width is none that these can have.
    """
    if not isinstance(widths, Mapping):
        raise InputError(f"widths must be a mapping, as target_widths returns it, got {widths!r}")
    if method not in METHODS:
        raise InputError(f"clustering.method must be one of {', '.join(METHODS)}, got {method!r}")
    by_name = {space.name: space for space in spaces}
    if of not in SOURCES:
        raise InputError(f"clustering.of must be one of {', '.join(SOURCES)}, got {of!r}")
    found, by_kmeans = {}, []
    for name, width in widths.items():
        if name not in by_name:
            raise InputError(f"widths: there is no channel space '{name}'")
        space, slots = by_name[name], np.arange(by_name[name].size)
        check_width(space, width)
        parts = parts_of(space)
        if method == "kmeans" and width < space.size:
            by_kmeans.append(space)
        elif method == "imbalanced" and conditions.one_size(space) is None:
            found[name] = _members(slots, np.maximum(slots - (space.size - width), 0))
        else:
            runs = [(part, np.arange(len(part)) * width // space.size) for part in parts]
            found[name] = sorted(members for part, labels in runs for members in _members(part, labels))
    if of == "outputs" and by_kmeans:
        if data is None:
            raise InputError("clustering.of=outputs needs data: a few batches, each as the network is called with it")
        weights = [[tensor_of(model, ref) for ref in space.producers] for space in by_kmeans]
        rows = output_rows(model, by_kmeans, weights, data)
    else:
        rows = {space.name: filters(model, space, of) for space in by_kmeans}
    if rows:  # looking for the threads of libraries takes a while
        found |= _kmeans(rows, by_name, widths, seed)
    clusters = {name: found[name] for name in widths}
    check_clusters(spaces, clusters)
    return clusters


def check_width(space: ChannelSpace, width: int) -> None:
    """InputError unless a space can become so wide."""
    if not is_slot(width) or not 1 <= width <= space.size:
        raise InputError(f"widths.{space.name} must be between 1 and {space.size}, got {width!r}")
    condition = conditions.one_size(space)
    if condition and width not in (allowed := [space.size // size for size in (1, *condition.sizes)]):
        raise InputError(f"widths.{space.name} must be {', '.join(map(str, allowed))}, got {width}: {condition}")


def parts_of(space: ChannelSpace) -> list[np.ndarray]:
    """Sets of slots within which clusters must stay: all slots, but where a condition says otherwise."""
    condition = conditions.one_size(space)
    return [np.array(part) for part in condition.parts] if condition else [np.arange(space.size)]


def _members(slots: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    members = defaultdict(list)
    for slot, label in zip(slots.tolist(), labels.tolist(), strict=True):
        members[label].append(slot)
    return sorted(members.values())


def filters(model: nn.Module, space: ChannelSpace, of: str = "pacesetter") -> Tensor:
    """Kernels as rows, one per slot.

    pacesetter  those of the first producer, [slots, lanes × k] (section 3.2)
    producers   those of every producer side by side, each kernel divided by its norm so that it counts as one
    """
    if of == "pacesetter":
        return _rows(model, space.producers[0], space.size)
    kernels = [_rows(model, ref, space.size) for ref in space.producers]
    return torch.cat([rows / rows.norm().clamp(min=1e-30) for rows in kernels], 1)


def _rows(model: nn.Module, ref: Ref, size: int) -> Tensor:
    weight = weight_of(model, ref)
    rows = weight.index_select(ref.dim, ref.index.reshape(-1).to(weight.device)).movedim(ref.dim, 0)
    return rows.reshape(size, -1)


def _kmeans(
    kernels: Mapping[str, Tensor], spaces: Mapping[str, ChannelSpace], widths: Mapping[str, int], seed: int
) -> dict[str, list[list[int]]]:
    """The clusters of each space, several spaces at once, each on one thread: the same ones however many there are."""
    from threadpoolctl import threadpool_limits

    def fit(name: str) -> list[list[int]]:
        space, rows = spaces[name], kernels[name].double().cpu().numpy()
        if not np.isfinite(rows).all():
            raise InputError(f"the weights of {name} hold NaN or infinity, they cannot be clustered")
        of_one_size = conditions.one_size(space) is not None
        fits = [
            (part, _kmeans_of(rows[part], len(part) * widths[name] // space.size, seed, of_one_size))
            for part in parts_of(space)
        ]
        return sorted(members for part, labels in fits for members in _members(part, labels))

    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=threadpool_limits, initargs=(1, "openmp"))
    with threadpool_limits(1, "blas"), pool:
        return dict(zip(kernels, pool.map(fit, kernels), strict=True))


def _kmeans_of(rows: np.ndarray, width: int, seed: int, of_one_size: bool) -> np.ndarray:
    from sklearn.cluster import KMeans

    if rows.shape[1] > rows.shape[0]:
        rows = np.linalg.qr(rows.T, mode="r").T  # n filters span n dims at most: coordinates there, the same distances
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct filters than clusters: mended below
        fit = KMeans(width, n_init=STARTS, random_state=seed).fit(rows)
    if of_one_size:
        return balanced(rows, fit.cluster_centers_)
    labels = fit.labels_.copy()
    farthest = np.argsort(-np.linalg.norm(rows - fit.cluster_centers_[labels], axis=1), kind="stable").tolist()
    for empty in sorted(set(range(width)) - set(labels.tolist())):
        counts = np.bincount(labels, minlength=width)
        labels[next(slot for slot in farthest if counts[labels[slot]] > 1)] = empty
    return labels


@dataclass(frozen=True)
class ClusteredTensor:
    """A parameter or buffer that a clustering touches, its clusters written as segments.

    merged  (dim, segments): rows along `dim` become equal (filters, vectors, statistics)
    summed  (dim, segments): input slices along `dim` are summed at the cut (consumers)
    rows    (dim, segments, factors): where the cut does not take the mean of equal rows alone, all rows that it makes
            one, and what it multiplies the mean by: the number of members where they are summed (keys, fact F14)
    lengths owners of g where this is the v of a weight norm, w = g · v / ‖v‖
    Segments [positions] give the position of the representative of each position's cluster.
    """

    owners: list[tuple[str, str]]
    tensor: Tensor
    merged: tuple[int, Tensor] | None
    summed: tuple[int, Tensor] | None
    rows: tuple[int, Tensor, Tensor] | None = None
    lengths: Sequence[tuple[str, str]] = ()

    @property
    def cut_rows(self) -> tuple[int, Tensor] | None:
        """(dim, segments) of all rows that become one."""
        return self.rows[:2] if self.rows else self.merged

    @property
    def name(self) -> str:
        return dotted(*self.owners[0])

    @property
    def becomes_equal(self) -> bool:
        """Whether any cluster of its rows has two members."""
        return self.merged is not None and len(representatives(self.merged[1])) < len(self.merged[1])

    @property
    def is_statistic(self) -> bool:
        """Running statistics of batch norm: buffers, which no optimizer pulls together."""
        return not isinstance(self.tensor, nn.Parameter) and self.tensor.is_floating_point()

    @torch.no_grad()
    def relative_deviation(self) -> float:
        """‖W − ΓW‖ / ‖W‖: 0 where no rows become equal, infinity where W holds NaN or infinity."""
        tensor = self.tensor.detach()
        if not self.becomes_equal or not tensor.numel():
            return 0.0
        if tensor.element_size() < 4 or not (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.float()
        largest = tensor.abs().max()
        if not largest.isfinite():
            return math.inf
        if not largest:
            return 0.0
        tensor = tensor / largest  # squares of small weights would be 0
        return float((tensor - segment_mean(tensor, *self.merged)).norm() / tensor.norm())

    def narrowed(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the same shape as this one, after the cut: of each cluster the mean of its rows, in the place of
        the representative, and the sum of its input slices; laid out as it was."""
        for clustered, mean in ((self.cut_rows, True), (self.summed, False)):
            if clustered:
                tensor = one_of_each(tensor, *clustered, mean=mean)
        return scale_along(tensor, [(self.rows[0], self._factors(tensor))]) if self.rows else tensor

    def _factors(self, tensor: Tensor) -> Tensor:
        _, segments, factors = self.rows
        return factors[representatives(segments)].to(tensor.device, tensor.dtype)

    def kept(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the same shape as this one, without all but the representatives: their rows and input slices."""
        order = memory_order(tensor)
        for clustered in filter(None, (self.cut_rows, self.summed)):
            dim, segments = clustered
            tensor = tensor.index_select(dim, representatives(segments).to(tensor.device))
        return laid_out(tensor, order)

    def after_cut(self, positions: Tensor) -> Tensor:
        """Where the rows of some positions are after the cut: the members of a cluster in one place."""
        segments = self.cut_rows[1]
        return torch.searchsorted(representatives(segments), segments[positions])

    def gradient_scales(self, device, dtype) -> list[tuple[int, Tensor]]:
        """(dim, factors) along the dims of the narrowed tensor: 1/|H| on rows, |H| on input slices (fact F7), and on
        rows that are multiplied by f at the cut f²/|H|: |H| where that sums them."""
        rows = self.row_scales(device, dtype, 2)
        return rows + ([(self.summed[0], _members_of(self.summed[1]).to(device, dtype))] if self.summed else [])

    def row_scales(self, device, dtype, power: int = 1) -> list[tuple[int, Tensor]]:
        """The scales of rows, f ** power / |H|; power 1: as large as one member's gradient."""
        if not self.cut_rows:
            return []
        dim, segments = self.cut_rows
        scales = 1 / _members_of(segments).to(device, dtype)
        if self.rows:
            scales = scales * self._factors(scales) ** power
        return [(dim, scales)]


def _members_of(segments: Tensor) -> Tensor:
    """The number of members of each cluster."""
    return torch.bincount(segments, minlength=len(segments))[representatives(segments)]


def clustered_tensors(
    model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters, *, for_cut: bool = True
) -> list[ClusteredTensor]:
    """Every tensor of `model` that `clusters` touches, once, also where several spaces share a dim of it (concat).

    for_cut  whether the conditions of the spaces must hold; members may become equal without
    """
    check_clusters(spaces, clusters, for_cut=for_cut)
    refs = defaultdict(list)
    for space, first in _firsts(spaces, clusters):
        for ref in space.refs:
            if ref.role != "size":
                refs[tuple(ref.owners)].append((ref, first))
    return [_clustered(list(owners), model, uses) for owners, uses in refs.items()]


def keep_buffers(model: nn.Module, touched: Iterable[ClusteredTensor]) -> None:
    """Lets the state_dict hold buffers that it leaves out since a network makes them anew: what becomes of them when
    members are made equal, or cut, it would not make."""
    for tensor in touched:
        for path, attribute in tensor.owners:
            model.get_submodule(path)._non_persistent_buffers_set.discard(attribute)


def _firsts(spaces: list[ChannelSpace], clusters: Clusters) -> Iterator[tuple[ChannelSpace, Tensor]]:
    """Each space that is clustered, and the representative [slots] of each slot."""
    for space in spaces:
        if space.name in clusters:
            of_slot = {slot: members[0] for members in clusters[space.name] for slot in members}
            yield space, torch.tensor([int(of_slot.get(slot, slot)) for slot in range(space.size)], device="cpu")


def _clustered(owners: list[tuple[str, str]], model: nn.Module, uses: list[tuple[Ref, Tensor]]) -> ClusteredTensor:
    """A tensor and the segments of its dims: where several spaces index the same positions (dims and whole heads) one
    acts on what the other leaves."""
    (tensor,) = {tensor_of(model, ref) for ref, _ in uses}
    segments: dict[str, tuple[int, Tensor]] = {}
    factors, apart = torch.empty(0, device="cpu"), False  # apart: of rows that the cut makes one, and that differ
    for ref, first in uses:
        kinds = ["in"] if ref.role == "in" else ["rows"] if ref.role in ("key", "length") else ["rows", "merged"]
        for kind in kinds:
            dim, vector = segments.setdefault(kind, (ref.dim, torch.arange(tensor.size(ref.dim), device="cpu")))
            if dim != ref.dim:
                raise InputError(f"{dotted(*owners[0])} is indexed along two dims by channels that become equal")
            vector[ref.index] = vector[ref.index[first]]
        if ref.role in ("key", "length"):
            apart, after = True, len(first.unique())
            factors = factors if len(factors) else torch.ones(ref.extent, dtype=torch.float64, device="cpu")
        if ref.role == "key":
            summed = first.bincount(minlength=len(first))[first].double() * (after / len(first)) ** ref.power
            factors[ref.index] *= summed[:, None]
    rows = (*segments["rows"], factors) if apart else None
    return ClusteredTensor(owners, tensor, segments.get("merged"), segments.get("in"), rows, uses[0][0].lengths)


def counted_channels(
    model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters
) -> dict[tuple[nn.Module, str], Integers]:
    """{(layer, attribute): what it says after the cut}, of integers, and tuples of them, that count channels."""
    counts: dict[tuple[nn.Module, str], Integers] = {}
    kept: dict[tuple[nn.Module, str, int], Tensor] = {}
    for space, first in _firsts(spaces, clusters):
        for ref in space.refs:
            if ref.role == "size":
                ((path, attribute),) = ref.owners
                key = model.get_submodule(path), attribute, ref.dim
                vector = kept.setdefault(key, torch.arange(ref.extent, device="cpu"))
                vector[ref.index] = vector[ref.index[first]]
    for (module, attribute, place), vector in kept.items():
        if lost := len(vector) - len(representatives(vector)):
            said = counts.get((module, attribute), getattr(module, attribute))
            counts[module, attribute] = replaced(said, place, at_place(said, place) - lost)
    return counts


def check_clusters(spaces: list[ChannelSpace], clusters: Clusters, *, for_cut: bool = True) -> None:
    """Raises InputError unless every entry is a set of disjoint clusters of a trimmable space's slots, and, where they
    are to be cut, keeps to the conditions of its space.

    Slots that no cluster names stay alone.
    """
    if not isinstance(clusters, Mapping):
        raise InputError(f"clusters must be a mapping {{space name: [[slot, …], …]}}, got {type(clusters).__name__}")
    by_name = {space.name: space for space in spaces}
    for name, parts in clusters.items():
        if name not in by_name:
            raise InputError(f"clusters: there is no channel space '{name}'")
        space = by_name[name]
        lists = Sequence | np.ndarray
        listed = isinstance(parts, lists) and all(isinstance(members, lists) for members in parts)
        if not listed or not all(is_slot(slot) for members in parts for slot in members):
            raise InputError(f"clusters.{name} must be a list of lists of slots, as [[0, 1], [2]]")
        slots = [slot for members in parts for slot in members]
        if not all(len(members) for members in parts):
            raise InputError(f"clusters.{name} has an empty cluster")
        if len(set(slots)) < len(slots) or not set(slots) <= set(range(space.size)):
            raise InputError(f"clusters.{name} must name each slot of 0 … {space.size - 1} at most once")
        if space.pinned and any(len(members) > 1 for members in parts):
            raise InputError(f"clusters.{name}: the space is pinned ({', '.join(space.pinned)})")
    if for_cut and (line := next(conditions.broken(spaces, clusters), None)):
        raise InputError(line)


def is_slot(value: object) -> bool:
    """Whether it is a whole number, of Python's or numpy's."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))  # the first is fast


def relative_deviation(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> float:
    """‖W − ΓW‖ / ‖W‖, the largest of any tensor whose rows become equal: what `trim` judges a collapse by.

    Of parameters, trained or frozen, running statistics and other buffers of the channels; infinity where one holds NaN
    or infinity.  InputError where no cluster has two members, since there nothing can collapse.
    """
    left = [t.relative_deviation() for t in clustered_tensors(model, spaces, clusters) if t.becomes_equal]
    if not left:
        raise InputError("no cluster has two members: nothing becomes equal, so there is no deviation")
    return max(left)


def tensor_of(model: nn.Module, ref: Ref) -> Tensor:
    """The tensor of `ref`; InputError if `model` has no such tensor, or another one than when the spaces were found."""
    tensors = [registered(model, *owner) for owner in ref.owners]
    tensor, name = tensors[0], dotted(*ref.owners[0])
    for one, owner in zip(tensors, ref.owners, strict=True):
        if one is None or one.dim() <= ref.dim:
            raise InputError(f"spaces of another network: this one has no tensor {dotted(*owner)} of their shape")
        if one is not tensor:
            raise InputError(
                f"{name} and {dotted(*owner)} were one tensor when the spaces were found: find_spaces again"
            )
    if tensor.size(ref.dim) != ref.extent:
        raise InputError(
            f"{name} has {tensor.size(ref.dim)} channels along dim {ref.dim} where its space was found with "
            f"{ref.extent}: it has been cut since, or is another network's; find_spaces again after a cut"
        )
    return tensor


def weight_of(model: nn.Module, ref: Ref) -> Tensor:
    """What a layer is called with: the tensor of `ref`, or g · v / ‖v‖ where that is the v of a weight norm."""
    v = tensor_of(model, ref).detach()
    g = registered(model, *ref.lengths[0]).detach() if ref.lengths else None
    return v if g is None else v * (g / norms(v, g))


def registered(model: nn.Module, path: str, attribute: str) -> Tensor | None:
    """The parameter or buffer of that name, None if there is none: a tensor that is computed cannot be cut."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module._parameters.get(attribute, module._buffers.get(attribute))

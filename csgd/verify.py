"""The verdict: what a run proves about its cut, and what it saved."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csgd.clusters import ClusteredTensor, Clusters, clustered_tensors
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.graph.twin import tensors_in
from csgd.train import accuracy

IMAGES = 256  # compared at once, in float64
MASK = 300  # an entry that is lower than minus this times the size of all above it is a mask that code wrote


@dataclass(frozen=True)
class Verdict:
    """What is measured at the cut, over the whole test set.

    deviation                Σ‖W − ΓW‖² over all clustered parameters just before the cut
    relative_deviation       ‖W − ΓW‖ / ‖W‖ of the worst tensor, running statistics included
    max_logit_change         largest |Δ| of any output by the cut
    relative_logit_change    of the image that changed most: the largest |Δ| of its outputs, divided by their spread
                             (max − min of its own finite outputs) before the cut; see `relative_change`
    statistics_spread        ‖S − ΓS‖ / ‖S‖ of the worst of batch norm's running statistics (fact F8)
    accuracy_before_trim, accuracy_after_trim, accuracy   by the score of the data, of which accuracy is the default;
                             the last is the pruned network's; NaN where the score does not fit the outputs
    collapsed                whether relative_deviation and statistics_spread are within their tolerance
    lossless                 whether, besides, relative_logit_change is within its own

    Where a moving average of the weights is what ships, the worse of the two networks counts in each number, and the
    accuracies are the average's.
    """

    lossless: bool
    collapsed: bool
    deviation: float
    relative_deviation: float
    max_logit_change: float
    relative_logit_change: float
    statistics_spread: float
    accuracy_before_trim: float
    accuracy_after_trim: float
    accuracy: float


def verdict(
    before,
    after,
    labels: Tensor,
    *,
    deviation: float,
    relative_deviation: float,
    statistics_spread: float,
    deviation_tolerance: float,
    logit_tolerance: float,
    score: Callable[..., float] = accuracy,
) -> Verdict:
    """Judges a cut by what the network says of n images before and after it, `labels` [n] beside it.

    before, after  logits [n, classes], or several outputs in tuples, dicts or objects, the logits first; all are judged
    score          (outputs, labels) → what is told as accuracy, and is no part of the judgement

    A classified image keeps its class wherever that leads by more than twice the largest |Δ| of its logits, since then
    best − |Δ| > second + |Δ|.  NaN anywhere is never lossless.  InputError if there is nothing to judge: no output, no
    image, or logits that are all zero.
    """
    changes = _changes(before, after)
    if len(labels) != changes.size(1):
        raise InputError(f"the verdict needs a label for each image: {len(labels)} for {changes.size(1)}")
    if not next(tensors_in(before)).count_nonzero():
        raise InputError("there is nothing to judge: the network answers every image with zeros")
    change, relative = changes.amax(1).tolist()
    collapsed = relative_deviation <= deviation_tolerance and statistics_spread <= deviation_tolerance
    after_trim = _score(score, after, labels)
    return Verdict(
        lossless=collapsed and relative <= logit_tolerance,
        collapsed=collapsed,
        deviation=deviation,
        relative_deviation=relative_deviation,
        max_logit_change=change,
        relative_logit_change=relative,
        statistics_spread=statistics_spread,
        accuracy_before_trim=_score(score, before, labels),
        accuracy_after_trim=after_trim,
        accuracy=after_trim,
    )


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several: lossless if each is, the largest changes, and the accuracies of the last."""
    largest = ("deviation", "relative_deviation", "max_logit_change", "relative_logit_change", "statistics_spread")
    return replace(
        verdicts[-1],
        **{key: all(getattr(v, key) for v in verdicts) for key in ("lossless", "collapsed")},
        **{key: _largest(getattr(v, key) for v in verdicts) for key in largest},
    )


def relative_change(before, after) -> Tensor:
    """Of each image the largest |Δ| of its outputs, divided by their spread before: [n], in float64.

    before, after  what a network says of n images: a tensor [n, …], or several in tuples, dicts or objects

    The spread is max − min of the image's own finite entries of an output tensor; where these are all equal, their
    absolute value stands for it, and where that is 0 too, nothing may change.  A mask of −1e4 or −1e9, far below all
    others, does not widen the spread of these.  Equal infinities have not changed.  Any other infinity, NaN, an integer
    that differs and an output of another shape have changed infinitely.  Of several outputs the one that changed most
    counts; one with another number of rows than n counts for every image.

    InputError if there is no output or no image.
    """
    return _changes(before, after)[1]


def _changes(before, after) -> Tensor:
    """Of each of n images the largest |Δ|, and the largest |Δ| / spread: [2, n]."""
    befores, afters = ([_rows(tensor) for tensor in tensors_in(outputs)] for outputs in (before, after))
    if not befores:
        raise InputError("there is nothing to judge: the network returns no tensor")
    n = len(befores[0])
    if n == 0:
        raise InputError("there is nothing to judge: no image")
    largest = torch.full((2, n), 0.0 if len(befores) == len(afters) else math.inf, dtype=torch.float64)
    for one, other in zip(befores, afters, strict=False):
        changes = _changes_of_rows(one, other)
        largest = largest.maximum(changes if changes.size(1) == n else changes.amax(1, keepdim=True))
    return largest


def _rows(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().to_dense()
    return torch.atleast_1d(torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor)


def _changes_of_rows(before: Tensor, after: Tensor) -> Tensor:
    """The largest |Δ| and |Δ| / spread of each row of one output: [2, rows], or one column for all rows."""
    if before.shape != after.shape:
        return torch.full((2, 1), math.inf, dtype=torch.float64)
    if not before.numel():
        return torch.zeros(2, 1, dtype=torch.float64)
    parts = (tensor.reshape(len(tensor), -1).split(IMAGES) for tensor in (before, after))
    return torch.cat([_changes_of_part(*pair) for pair in zip(*parts, strict=True)], 1)


def _changes_of_part(before: Tensor, after: Tensor) -> Tensor:
    same, is_exact = before == after, not before.is_floating_point()
    before, after = before.double(), after.double()
    change = torch.full_like(before, math.inf) if is_exact else (after - before).abs()
    change = change.masked_fill(same, 0.0).nan_to_num(math.inf, math.inf)
    relative = torch.where(change > 0, change / _scales(before), 0.0)
    return torch.stack([change.amax(1), relative.amax(1)])


def _scales(rows: Tensor) -> Tensor:
    """What the change of each entry is divided by: the spread of its row, masks apart; [n, 1] where there are none."""
    infinite = ~rows.isfinite()
    top = rows.masked_fill(infinite, -math.inf).amax(1, keepdim=True)
    rows = rows.masked_fill(infinite, math.inf)
    bottom = rows.amin(1, keepdim=True)
    scales = _spread(top, bottom)
    if (bottom < -MASK * top.abs()).any():
        lowest = _lowest_without_masks(rows, top)
        scales = torch.where(rows < lowest, scales, _spread(top, lowest))
    return scales


def _spread(top: Tensor, bottom: Tensor) -> Tensor:
    spread = torch.where(top > bottom, top - bottom, top.abs())
    return spread.clamp(max=torch.finfo(torch.float64).max)


def _lowest_without_masks(rows: Tensor, top: Tensor) -> Tensor:
    """The lowest entry of each row that is no mask [n, 1]; two finite entries at least are none."""
    ordered = rows.sort(1).values
    above = ordered[:, 1:-1].abs().maximum(top.abs())
    masks = (ordered[:, :-2] < -MASK * above) & ordered[:, 2:].isfinite()
    count = (masks * torch.arange(1, masks.size(1) + 1)).amax(1, keepdim=True)
    return ordered.gather(1, count)


def _score(score: Callable[..., float], outputs, labels: Tensor) -> float:
    try:
        return score(outputs, labels)
    except InputError:  # accuracy, of what is no classifier
        return math.nan


@torch.no_grad()
def deviation(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> float:
    """Σ‖W − ΓW‖² over the clustered parameters."""
    parameters = (t for t in _merged(model, spaces, clusters) if not t.is_statistic)
    return sum((t.relative_deviation() * float(t.tensor.norm())) ** 2 for t in parameters)


def worst_deviation(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> float:
    """Largest ‖W − ΓW‖ / ‖W‖ of any tensor whose rows the cut merges, running statistics included."""
    return _largest(t.relative_deviation() for t in _merged(model, spaces, clusters))


def statistics_spread(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> float:
    """Largest ‖S − ΓS‖ / ‖S‖ of any vector S of running statistics: they lag the filters (fact F8)."""
    return _largest(t.relative_deviation() for t in _merged(model, spaces, clusters) if t.is_statistic)


def _merged(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> list[ClusteredTensor]:
    touched = clustered_tensors(model, spaces, clusters)
    return [t for t in touched if t.merged and t.tensor.is_floating_point()]


def _largest(values: Iterable[float]) -> float:
    """NaN if one of them is, where max would depend on the order."""
    return max(values, key=lambda value: (math.isnan(value), value), default=0.0)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image: what papers call FLOPs."""
    return macs_by_module(model, example)[""]


@torch.no_grad()
def macs_by_module(model: nn.Module, example: Tensor) -> dict[str, int]:
    """The same of each module by its path, what is in it included; of the whole network under ''."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(example[:1])
    for module, training in modes:
        module.training = training
    root, counts = f"{type(model).__name__}.", counter.get_flop_counts()
    found = {name.removeprefix(root): sum(of.values()) // 2 for name, of in counts.items() if name.startswith(root)}
    return found | {"": counter.get_total_flops() // 2}


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

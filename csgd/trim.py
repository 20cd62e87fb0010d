"""The cut: removes all but one member of each cluster, and lets the consumers sum what they lose."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from csgd.carry_over import carry_over
from csgd.centripetal import segment_mean
from csgd.clusters import ClusteredTensor, Clusters, clustered_tensors, counted_channels, keep_buffers
from csgd.collapse import attached
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.graph.kernels import kernel_of, layer_of
from csgd.graph.twin import dotted
from csgd.hooks import check_hooks
from csgd.weight_norm import cut_values

log = logging.getLogger("csgd.trim")

LAYERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU
)  # fmt: skip
FITTED = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels",
    "num_groups", "num_parameters", "normalized_shape",
)  # fmt: skip  # attributes of LAYERS that follow the shapes of their parameters


@torch.no_grad()
def merge_equal(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> None:
    """Replaces the members of each cluster by their mean, W ← ΓW, in every producer and follower, in place.

    What C-SGD reaches by training, done in one stroke: the one-shot baseline, and the way to test `trim`.
    """
    touched = clustered_tensors(model, spaces, clusters, for_cut=False)
    keep_buffers(model, touched)
    for t in touched:
        if t.becomes_equal:
            merged = segment_mean(t.tensor.detach(), *t.merged)
            if not torch.equal(merged, t.tensor):  # a constant that was expanded has no memory for each entry
                t.tensor.copy_(merged)


def trim(
    model: nn.Module,
    spaces: list[ChannelSpace],
    clusters: Clusters,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    tolerance: float | None = 1e-3,
) -> None:
    """Leaves one channel of each cluster, in place: the mean of its members, where the first of them was; consumers sum
    the input slices of the members into one.

    Lossless when the members are equal.  InputError, before anything changes, if the relative deviation ‖W − ΓW‖ / ‖W‖
    of any tensor is above `tolerance`, running statistics included, which lag the filters by about 1 / momentum steps
    (fact F8); tolerance=None cuts all the same.

    A buffer that the state_dict leaves out (persistent=False), as a network makes it anew, is in it once it is cut.
    Every parameter and buffer stays the object that it is, with its attributes, hooks and places in lists; only its
    data is another, and its gradient None.  What remembers shapes must be made anew: wrappers of DDP, compiled steps,
    and optimizers, whose state is that of the wide network.  But those of torch's interface that are given, one or
    several, go on with the narrow network where they were: CSGD and SGD exactly (fact F7; not so under a penalty that
    is part of the loss, nor where inputs of a weight norm are cut, whose ‖v‖ is then another), others by the rule of
    `carry_over`.  A `Collapse` is found by its hooks on them, so that it cannot be forgotten: it is finished, and its
    other optimizers come along.  A moving average of the weights, whose members lag, goes on after `merge_equal` and
    `trim` of its own copy.

    Integers of the model's own modules that equal a width which is no more are listed in the log (csgd.trim, INFO).
    """
    optimizers = [*optimizer] if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
    for one in optimizers:
        check_hooks(one)
    collapses = {id(found): found for one in optimizers if (found := attached(one))}.values()
    for collapse in collapses:
        collapse.check()
        optimizers += [one for one in collapse.optimizers if all(one is not other for other in optimizers)]
    touched = clustered_tensors(model, spaces, clusters)
    if tolerance is not None:
        _refuse_unequal(model, touched, tolerance)
    for collapse in collapses:
        collapse.finish()
    stale = cut(model, spaces, clusters, optimizers)
    if stale:
        log.info("the cut leaves attributes that may say an old width: %s", "; ".join(stale))


def _refuse_unequal(model: nn.Module, touched: list[ClusteredTensor], tolerance: float) -> None:
    """Raises InputError if a tensor's deviation is above `tolerance`; names the worst, parameters before statistics."""
    if not tolerance >= 0:
        raise InputError(f"tolerance must be 0 or more, or None, got {tolerance}")
    deviations = [(isinstance(t.tensor, nn.Parameter), t.relative_deviation(), i) for i, t in enumerate(touched)]
    above = [one for one in deviations if one[1] > tolerance]
    if not above:
        return
    _, left, i = max(above)
    worst = touched[i]
    module = model.get_submodule(worst.owners[0][0])
    if isinstance(worst.tensor, nn.Parameter) and worst.tensor.requires_grad:
        way = "a csgd.Collapse or CSGD pulls it: train on with it until csgd.relative_deviation is below that"
    elif isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum != 0 and worst.is_statistic:
        way = "statistics lag the filters, and stand still in eval mode: train on with this layer in train mode"
    else:
        way = "training does not change it: csgd.Collapse does, or keep its layer whole"
    raise InputError(
        f"{worst.name} has not collapsed: relative deviation {left:.1e}, above the tolerance of {tolerance:.1e}; "
        f"{way}; merge_equal makes members equal in one stroke; tolerance=None cuts all the same, and changes outputs"
    )


@torch.no_grad()
def cut(
    model: nn.Module,
    spaces: list[ChannelSpace],
    clusters: Clusters,
    optimizers: Sequence[Optimizer] = (),
    narrowed: Callable[[ClusteredTensor, Tensor], Tensor] = ClusteredTensor.narrowed,
) -> list[str]:
    """The cut of `trim`, whatever the members are; returns the attributes that may say an old width.

    narrowed  what each tensor becomes
    """
    touched, counted = clustered_tensors(model, spaces, clusters), counted_channels(model, spaces, clusters)
    keep_buffers(model, touched)
    touched, narrow = zip(*cut_values(model, touched, narrowed), strict=True) if touched else ((), ())
    carry_over(optimizers, touched)
    multipliers, widths = depthwise_multipliers(model), defaultdict(lambda: defaultdict(set))
    for t, data in zip(touched, narrow, strict=True):
        changed = [(old, new) for old, new in zip(t.tensor.shape, data.shape, strict=True) if old != new]
        for path in {part for owner, _ in t.owners for part in _with_ancestors(owner)}:
            for old, new in changed:
                widths[path][old].add(new)
        if changed or t.rows:  # lengths of a weight norm keep their shape where inputs alone are cut
            replace_data(t.tensor, data)
    fit_attributes({model.get_submodule(layer_of(path)) for t in touched for path, _ in t.owners}, multipliers)
    for (module, attribute), count in counted.items():
        setattr(module, attribute, count)
    return [line for path in widths for line in _stale_integers(model.get_submodule(path), path, widths[path])]


@torch.inference_mode(False)
def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Gives a parameter or buffer data of another shape; it stays the object that it is."""
    if data.is_inference() and not tensor.is_inference():
        data = data.clone()  # what is made in inference mode could not be trained on
    if tensor.is_leaf:
        tensor.grad = None
    # While an old graph lives, torch keeps the node that accumulates the gradient, with the old shape; another dtype in
    # between makes it forget that node.
    other = torch.float32 if tensor.dtype == torch.float16 else torch.float16
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _with_ancestors(path: str) -> Iterator[str]:
    """'a.b' → '', 'a', 'a.b'"""
    parts = path.split(".") if path else []
    return (".".join(parts[:end]) for end in range(len(parts) + 1))


def _stale_integers(module: nn.Module, path: str, widths: Mapping[int, set[int]]) -> Iterator[str]:
    """Integers among the attributes of a module that is not torch's own which equal an old width."""
    if type(module).__module__.startswith("torch."):
        return
    for attribute, value in vars(module).items():
        if attribute in FITTED and isinstance(module, LAYERS):
            continue
        for where, number in _integers(value):
            if number in widths:
                now = " or ".join(map(str, sorted(widths[number])))
                yield f"{dotted(path, attribute)}{where} = {number} (now {now})"


def _integers(value: Any, depth: int = 2) -> Iterator[tuple[str, int]]:
    """Integers in a value, and in lists and dicts two levels deep, with the way to them."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield "", value
    elif depth and isinstance(value, list | tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ((f"[{key!r}]{where}", number) for where, number in _integers(item, depth - 1))


def statistics_momentum(model: nn.Module) -> float | None:
    """The smallest momentum of any running statistics, which lag the filters by about its inverse in steps (F8).

    0 where some are averages over all batches (momentum=None): what these have seen they never forget.  Those of
    momentum 0 are constants.
    """
    momenta = [
        module.momentum or 0.0
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.momentum != 0
    ]
    return min(momenta, default=None)


def depthwise_multipliers(model: nn.Module) -> dict[nn.Module, int]:
    """Output channels per input channel of every depthwise conv; read before its shape changes."""
    return {
        module: module.out_channels // module.in_channels
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
    }


def fit_attributes(modules: Iterable[nn.Module], multipliers: dict[nn.Module, int]) -> None:
    """Makes in_channels, groups, num_features … say what the shapes of the parameters say."""
    for module in modules:
        weight = kernel_of(module)
        if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
            if module in multipliers:
                module.groups = module.in_channels = (
                    weight.size(0) if module.transposed else weight.size(0) // multipliers[module]
                )
                module.out_channels = module.in_channels * multipliers[module]
            elif module.transposed:
                module.in_channels, module.out_channels = weight.size(0), weight.size(1) * module.groups
            else:
                module.out_channels, module.in_channels = weight.size(0), weight.size(1) * module.groups
        elif isinstance(module, nn.Linear) and weight is not None:
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.MultiheadAttention):
            together = module._parameters.get("in_proj_weight")
            names = ["in_proj_weight"] * 3 if together is not None else [f"{one}_proj_weight" for one in "qkv"]
            parts = [module._parameters[name] for name in names]
            module.embed_dim, module.kdim, module.vdim = (part.size(1) for part in parts)
        elif isinstance(module, nn.RNNBase):
            module.hidden_size, module.input_size = module.weight_hh_l0.size(1), module.weight_ih_l0.size(1)
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = weight.size(1)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.PReLU):
            vector = weight if weight is not None else module._buffers.get("running_mean")
            if vector is None:
                continue
            if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
                module.num_groups = len(vector)
            for attribute in ("num_features", "num_channels", "num_parameters"):
                if hasattr(module, attribute):
                    setattr(module, attribute, len(vector))

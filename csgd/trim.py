"""The cut: removes all but one member of each cluster, and lets the consumers sum what they lose."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from csgd.centripetal import segment_mean
from csgd.clusters import ClusteredTensor, Clusters, clustered_tensors
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.optim import CSGD


@torch.no_grad()
def merge_equal(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> None:
    """Replaces the members of each cluster by their mean, W ← ΓW, in every producer and follower, in place.

    What C-SGD reaches by training, done in one stroke: the one-shot baseline, and the way to test `trim`.
    """
    touched = [t for t in clustered_tensors(model, spaces, clusters) if t.merged]
    _replace(model, touched, lambda t: segment_mean(t.tensor.detach(), *t.merged))


@torch.no_grad()
def trim(
    model: nn.Module,
    spaces: list[ChannelSpace],
    clusters: Clusters,
    optimizer: CSGD | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Keeps the first member of each cluster, in place; consumers sum the input slices of the others into its slice.

    Lossless when the members are equal.  Running statistics lag the filters by about 1 / momentum steps, so they are
    averaged over the cluster (fact F8).  Every tensor that is touched becomes a new one: wrappers of DDP must be made
    anew, and so must optimizers, but for an `optimizer` that is given: it goes on with the narrow network where it was
    with the wide one (`CSGD.carry_over`, fact F7).  A moving average of the weights, whose members lag, goes on after
    `merge_equal` and `trim` of its own copy.

    With `tolerance`, InputError if a tensor's relative deviation ‖W − ΓW‖ / ‖W‖ is above it, before anything changes.
    """
    touched = clustered_tensors(model, spaces, clusters)
    if tolerance is not None:
        for t in touched:
            if isinstance(t.tensor, nn.Parameter) and (left := t.relative_deviation()) > tolerance:
                raise InputError(
                    f"{'.'.join(t.owners[0])} has not collapsed: relative deviation {left:.1e} above {tolerance:.1e}"
                )
    multipliers = _depthwise_multipliers(model)
    replaced = _replace(model, touched, lambda t: t.narrowed(t.tensor.detach(), mean=t.is_statistic))
    _fit_attributes({model.get_submodule(path) for t in touched for path, _ in t.owners}, multipliers)
    if optimizer is not None:
        optimizer.carry_over(replaced)


def statistics_momentum(model: nn.Module) -> float | None:
    """The smallest momentum of any running statistics, which lag the filters by about its inverse in steps (F8)."""
    momenta = [
        module.momentum
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.momentum
    ]
    return min(momenta, default=None)


def load_trimmed(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Gives a freshly built wide `model` the widths of a trimmed state_dict, and loads it.

    The shapes in the state_dict are the table of widths: no plan file and no analysis is needed.  InputError if keys
    are missing, left over, or of another number of dims or wider than the model's.
    """
    own = model.state_dict(keep_vars=True)
    if own.keys() != state_dict.keys():
        missing, extra = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        raise InputError(f"weights of another architecture: missing {missing[:3]}, left over {extra[:3]}")
    multipliers = _depthwise_multipliers(model)
    narrowed: dict[int, tuple[Tensor, Tensor]] = {}  # holds the old tensors too, so that their ids stay theirs
    for key, new in state_dict.items():
        old = own[key]
        if not isinstance(old, Tensor):  # what a module's get_extra_state returns
            continue
        if old.dim() != new.dim() or any(a < b for a, b in zip(old.shape, new.shape, strict=True)):
            raise InputError(
                f"weights of another architecture: {key} is {list(new.shape)}, at most {list(old.shape)} fit"
            )
        if new.shape != old.shape and id(old) not in narrowed:
            # In the layout of a cut in place: another one would round otherwise (fact F10).
            form = torch.contiguous_format if old.is_contiguous() or old.dim() != 4 else torch.channels_last
            empty = torch.empty(new.shape, dtype=old.dtype, device=old.device, memory_format=form)
            is_parameter = isinstance(old, nn.Parameter)
            narrowed[id(old)] = old, nn.Parameter(empty, old.requires_grad) if is_parameter else empty
    changed = set()
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for attribute, tensor in store.items():
                if id(tensor) in narrowed:
                    store[attribute] = narrowed[id(tensor)][1]
                    changed.add(module)
    _fit_attributes(changed, multipliers)
    model.load_state_dict(state_dict)
    return model


def _replace(
    model: nn.Module, touched: list[ClusteredTensor], new: Callable[[ClusteredTensor], Tensor]
) -> dict[Tensor, tuple[Tensor, ClusteredTensor]]:
    """Puts new(t) in the place of every touched tensor, in all its owners; {old: (new, t)}."""
    replaced = {}
    for t in touched:
        tensor = new(t).detach()
        if isinstance(t.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, t.tensor.requires_grad)
        for path, attribute in t.owners:
            module = model.get_submodule(path)
            store = module._parameters if attribute in module._parameters else module._buffers
            store[attribute] = tensor
        replaced[t.tensor] = tensor, t
    return replaced


def _depthwise_multipliers(model: nn.Module) -> dict[nn.Module, int]:
    """Output channels per input channel of every depthwise conv; read before its shape changes."""
    return {
        module: module.out_channels // module.in_channels
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
    }


def _fit_attributes(modules: Iterable[nn.Module], multipliers: dict[nn.Module, int]) -> None:
    """Makes in_channels, groups, num_features … say what the shapes of the parameters say."""
    for module in modules:
        weight = module._parameters.get("weight")
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
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.PReLU):
            vector = weight if weight is not None else module._buffers.get("running_mean")
            if vector is None:
                continue
            if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
                module.num_groups = len(vector)
            for attribute in ("num_features", "num_channels", "num_parameters"):
                if hasattr(module, attribute):
                    setattr(module, attribute, len(vector))

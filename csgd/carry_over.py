"""Any torch optimizer goes on with the narrow network where it was with the wide one."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from csgd.centripetal import one_of_each, scale_along
from csgd.clusters import ClusteredTensor
from csgd.errors import InputError
from csgd.hooks import on_gradients, parameters_of
from csgd.optim import CSGD

SCALES = "gradient_scales"  # of a group: (dim, factors) for each parameter, as CSGD has them; state_dict saves them
WEIGHTS = ("ax",)  # state that is an average of the weights, in torch.optim.ASGD: cut as they are


def like_parameter(value: object, p: Tensor) -> bool:
    """Whether an optimizer's value has an entry for each of a parameter's, or for each row and column (Adafactor)."""
    return (
        isinstance(value, Tensor)
        and (value.is_floating_point() or value.is_complex())
        and value.dim() == p.dim() > 0
        and all(size in (1, whole) for size, whole in zip(value.shape, p.shape, strict=True))
    )


@torch.no_grad()
def carry_over(optimizers: Sequence[Optimizer], touched: Sequence[ClusteredTensor]) -> None:
    """Goes on with parameters that are cut, which stay the same objects; `trim` calls it before the cut.

    The state of a row is that of one member, which are equal; of input slices that are summed it is the mean, since
    their gradients were equal.  From here on the gradient of a row counts 1/|H|: that of the narrow network is the sum
    over the members, and a second moment of their mean would make Adam's steps |H| times too long until it has
    forgotten (fact F11).  For SGD fact F7 holds instead: momentum is summed, and the gradient of a slice counts |H|, so
    that steps are exactly those of the wide network with equal members.  LBFGS starts anew.

    InputError at a second cut, and where none of these parameters is held by any of the optimizers.
    """
    cut = {t.tensor: t for t in touched}
    for optimizer in optimizers:
        if any(group.get(SCALES) for group in optimizer.param_groups):
            kind = type(optimizer).__name__
            raise InputError(f"this optimizer has gone through a cut already; the next one needs a new {kind}")
    held = [optimizer for optimizer in optimizers if any(p in cut for p in parameters_of(optimizer))]
    if cut and optimizers and not held:
        raise InputError("this optimizer trains none of the parameters that are cut: it is another network's")
    for optimizer in held:
        if isinstance(optimizer, CSGD):
            optimizer.carry_over(touched)
        elif isinstance(optimizer, LBFGS):
            optimizer.state.clear()
            optimizer._numel_cache = None
        else:
            _carry_over(optimizer, cut)


def _carry_over(optimizer: Optimizer, cut: Mapping[Tensor, ClusteredTensor]) -> None:
    exact = isinstance(optimizer, SGD)
    for group in optimizer.param_groups:
        group[SCALES] = [None] * len(group["params"])
        for i, p in enumerate(group["params"]):
            if p not in cut:
                continue
            t, state = cut[p], optimizer.state.get(p, {})
            for key, value in state.items():
                if like_parameter(value, p):
                    state[key] = t.narrowed(value) if exact or key in WEIGHTS else _of_one(value, t)
            scales = t.gradient_scales(p.device, p.dtype) if exact else t.row_scales(p.device, p.dtype)
            group[SCALES][i] = scales or None
    scale_gradients(optimizer)


def scale_gradients(optimizer: Optimizer) -> None:
    """Multiplies gradients, in place and before each step, by the factors that `carry_over` left in the groups.

    For an optimizer made anew from the state_dict of one that was cut; that one does so already.
    """
    for group in optimizer.param_groups:
        if SCALES not in group:
            raise InputError("this optimizer has no scales: load the state_dict of one that trim took along")
    on_gradients(optimizer, partial(_scale_gradients, optimizer))


@torch.no_grad()
def unscale(optimizer: Optimizer) -> None:
    """After a cut: SGD that takes the trimmed network as it is.  Gradients count once, momentum goes over into their
    units.  InputError for optimizers whose state has units that are not known."""
    if isinstance(optimizer, CSGD):
        optimizer.unscale()
        return
    if not isinstance(optimizer, SGD):
        raise InputError(f"{type(optimizer).__name__} keeps its state in units that are not known: make it anew")
    for group in optimizer.param_groups:
        for p, factors in zip(group["params"], group.get(SCALES) or [], strict=False):
            buffer = optimizer.state.get(p, {}).get("momentum_buffer")
            if factors and buffer is not None:
                buffer.copy_(scale_along(buffer, [(dim, 1 / vector) for dim, vector in factors]))
        group[SCALES] = None


@torch.no_grad()
def _scale_gradients(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for p, factors in zip(group["params"], group.get(SCALES) or [], strict=False):
            if factors and p.grad is not None:
                p.grad.copy_(scale_along(p.grad, [(dim, vector.to(p.grad)) for dim, vector in factors]))


def _of_one(value: Tensor, t: ClusteredTensor) -> Tensor:
    """State after the cut: of the members of a cluster, rows and input slices alike, their mean; laid out as it was."""
    for dim, segments in filter(None, (t.cut_rows, t.summed)):
        if value.size(dim) > 1:
            value = one_of_each(value, dim, segments, mean=True)
    return value

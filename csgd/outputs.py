"""How far apart the outputs of channels are, measured in one pass over a few batches: what k-means on outputs reads."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from csgd.errors import InputError
from csgd.graph import ChannelSpace, Inputs, Ref
from csgd.graph.twin import dotted, keep_random_state, run

log = logging.getLogger("csgd.outputs")

LAYERS = {"linear", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))}
AFFINE = {"add", "add_", "sub", "sub_", "__rsub__", "mul", "mul_", "div", "div_"}  # and batch norm in eval mode
AT_ONCE = 2**16  # values of each channel whose products are taken in one piece


@dataclass
class _Moments:
    """Of the outputs y [c] of a layer with a 1 beside them: the sum of (y, 1)(y, 1)ᵀ over n positions and images.

    scale, shift  [c] of the norm, frozen norm or layer scale behind the layer, which reads just these outputs
    """

    total: Tensor
    groups: int
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, rows: Tensor, groups: int) -> "_Moments":
        size = rows.size(1)
        zeros = rows.new_zeros(size + 1, size + 1, dtype=torch.float64)
        return cls(zeros, groups, torch.ones_like(zeros[0, :-1]), torch.zeros_like(zeros[0, :-1]))

    def add(self, rows: Tensor) -> None:
        for piece in rows.split(AT_ONCE):
            beside = torch.cat([piece, piece.new_ones(len(piece), 1)], 1)
            self.total += (beside.T @ beside).double()

    def second(self) -> Tensor:
        """E[yyᵀ] [c, c] of the outputs, behind what scales and shifts them."""
        affine = torch.cat([self.scale.diag(), self.shift[:, None]], 1)
        return affine @ (self.total / self.total[-1, -1]) @ affine.T


@dataclass(frozen=True)
class _Made:
    """A tensor that is scale · y + shift of the outputs y of a layer, whose channels lie in `dim`."""

    weight: int
    dim: int
    scale: Tensor
    shift: Tensor


class _Watch(TorchFunctionMode):
    """Takes the moments of what layers put out, by the weight that each is called with."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.of_weight: dict[int, _Moments | None] = {id(weight): None for weight in weights}
        self._normed = WeakTensorKeyDictionary()  # a weight that is computed with weight norm -> the id of its v
        self._moving = WeakTensorKeyDictionary()  # what depends on the batch -> how it was made of a layer's outputs

    def begin(self, batch: Inputs) -> None:
        self._moving.clear()
        self._moving.update((tensor, None) for tensor in batch.tensors())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given, made = {**dict(enumerate(args)), **kwargs}, None
        name = getattr(func, "__name__", "")
        moving = [key for key, value in given.items() if isinstance(value, Tensor) and value in self._moving]
        source = self._moving[given[moving[0]]] if len(moving) == 1 else None
        if source and (name in AFFINE or (name == "batch_norm" and not given.get(5, given.get("training")))):
            made = self._behind(source, func, args, kwargs, moving[0])
        out = func(*args, **kwargs)
        if name == "_weight_norm":
            self._normed[out] = id(args[0])
        weight = given.get(1, given.get("weight")) if name in LAYERS else None
        if weight is not None and (key := self._normed.get(weight, id(weight))) in self.of_weight:
            dim = -1 if name == "linear" else out.dim() - weight.dim() + 1
            groups = given.get(6, given.get("groups", 1)) if "transpose" in name else 1
            made = self._outputs(key, out, dim, groups)
        if moving or made:
            self._moving.update((part, made) for part in tree_leaves(out) if isinstance(part, Tensor))
        return out

    def _outputs(self, weight: int, out: Tensor, dim: int, groups: int) -> _Made:
        rows = out.movedim(dim, -1).flatten(0, -2)
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        if (moments := self.of_weight[weight]) is None:
            moments = self.of_weight[weight] = _Moments.of(rows, groups)
        moments.add(rows)
        return _Made(weight, dim, torch.ones_like(moments.scale), torch.zeros_like(moments.shift))

    def _behind(self, source: _Made, func: Callable, args: tuple, kwargs: dict, key: int | str) -> _Made | None:
        """What an affine function makes of scaled outputs, read off what it makes of 0 and 1 in every channel.

        None if it is not the same for all images and positions, whose sizes are 1 in what it is tried on; or if what it
        makes of 2 says that it is not affine, as 1 / y and a division that rounds.
        """
        whole = args[key] if isinstance(key, int) else kwargs[key]
        shape = [1] * whole.dim()
        shape[source.dim] = whole.size(source.dim)
        zeros = whole.new_zeros(shape)
        made = []
        for probe in (zeros, zeros + 1, zeros + 2):
            tried = func(
                *(probe if i == key else arg for i, arg in enumerate(args)),
                **{name: probe if name == key else value for name, value in kwargs.items()},
            )
            if tried.shape != zeros.shape:
                return None
            made.append(tried.flatten().double().clone())
        scale, shift = made[1] - made[0], made[0]
        off, rounding = (made[2] - 2 * scale - shift).abs(), torch.finfo(whole.dtype).eps ** 0.5
        if not (off <= rounding * (scale.abs() + shift.abs())).all():  # nor where one of them is infinite
            return None
        moments = self.of_weight[source.weight]
        moments.scale, moments.shift = source.scale * scale, source.shift * scale + shift
        return _Made(source.weight, source.dim, moments.scale, moments.shift)


@torch.no_grad()
def output_rows(
    model: nn.Module, spaces: Sequence[ChannelSpace], tensors: Sequence[Sequence[Tensor]], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Rows [slots, slots] of each space, whose squared distances are those of its channels' outputs, E (y_i − y_j)².

    Of all producers (their weights are `tensors`, as `space.producers`), summed, and of all lanes of a slot; behind the
    batch norm (frozen or not) and the layer scale that read a producer's outputs, in eval mode, over all positions and
    images.

    With W̃ the kernel rows and biases beside them, and x̃ an input patch with a 1 beside it, y = W̃x̃, so that the rows of
    W̃ E[x̃x̃ᵀ]^½ and those of E[yyᵀ]^½ have the same distances and means; the second matrix is c × c, whatever the patch.
    InputError without batches, or where a producer is not called on them.
    """
    started, count, watch = time.perf_counter(), 0, _Watch(weight for of_space in tensors for weight in of_space)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with keep_random_state(model):
            model.eval()
            for count, batch in enumerate(batches, 1):  # noqa: B007
                watch.begin(inputs := Inputs.of(batch))
                with watch:
                    run(model, inputs)
    finally:
        for module, training in modes:
            module.training = training
    if not count:
        raise InputError("clustering.of=outputs needs at least one batch in data")
    rows = {}
    for space, weights in zip(spaces, tensors, strict=True):
        total = 0
        for ref, weight in zip(space.producers, weights, strict=True):
            moments = watch.of_weight[id(weight)]
            if moments is None:
                raise InputError(f"{dotted(*ref.owners[0])} is not called on the batches in data")
            second = moments.second()
            total += sum(second[lane][:, lane] for lane in _positions(ref, moments.groups).T)
        if not total.isfinite().all():
            raise InputError(f"the outputs of {space.name} hold NaN or infinity, they cannot be clustered")
        values, vectors = torch.linalg.eigh(total)
        rows[space.name] = vectors * values.clamp(min=0).sqrt()
    layers = sum(map(len, tensors))
    log.info("outputs of %d layers measured on %d batches: %.1f s", layers, count, time.perf_counter() - started)
    return rows


def _positions(ref: Ref, groups: int) -> Tensor:
    """Channels of the output [slots, lanes]: a transposed conv of several groups names those of the first one."""
    return torch.cat([ref.index + group * ref.extent for group in range(groups)], 1)

"""How far apart the outputs of channels are, measured in one pass over a few batches: what k-means on outputs reads."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from csgd.errors import InputError
from csgd.graph import ChannelSpace, Inputs, Ref
from csgd.graph.twin import keep_random_state, run

log = logging.getLogger("csgd.outputs")

LAYERS = {"linear", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))}
AT_ONCE = 2**16  # values of each channel whose products are taken in one piece


@dataclass
class _Moments:
    """Of the outputs y [c] of a layer with a 1 beside them: the sum of (y, 1)(y, 1)ᵀ over n positions and images.

    scale, shift  [c] of the batch norm behind the layer, if one reads just these outputs
    """

    total: Tensor
    groups: int
    scale: Tensor | None = None
    shift: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        for piece in rows.split(AT_ONCE):
            beside = torch.cat([piece, piece.new_ones(len(piece), 1)], 1)
            self.total += (beside.T @ beside).double()

    def second(self) -> Tensor:
        """E[yyᵀ] [c, c] of the outputs, behind the batch norm where there is one."""
        moments = self.total / self.total[-1, -1]
        if self.scale is None:
            return moments[:-1, :-1]
        affine = torch.cat([self.scale.diag(), self.shift[:, None]], 1)
        return affine @ moments @ affine.T


class _Watch(TorchFunctionMode):
    """Takes the moments of what layers put out, by the weight that each is called with."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.of_weight: dict[int, _Moments | None] = {id(weight): None for weight in weights}
        self._made = WeakTensorKeyDictionary()  # output -> id of the weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {**dict(enumerate(args)), **kwargs}
        name = getattr(func, "__name__", "")
        if name in LAYERS and id(weight := given.get(1, given.get("weight"))) in self.of_weight:
            dim = -1 if name == "linear" else out.dim() - weight.dim() + 1
            groups = given.get(6, given.get("groups", 1)) if "transpose" in name else 1
            self._add(id(weight), out.movedim(dim, -1).flatten(0, -2), groups)
            self._made[out] = id(weight)
        elif name == "batch_norm" and (made := self._made.get(given.get(0, given.get("input")))) is not None:
            self._norm(self.of_weight[made], *(given.get(i, given.get(key)) for i, key in enumerate(
                ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            )))  # fmt: skip
        return out

    def _add(self, weight: int, rows: Tensor, groups: int) -> None:
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        if self.of_weight[weight] is None:
            size = rows.size(1) + 1
            self.of_weight[weight] = _Moments(rows.new_zeros(size, size, dtype=torch.float64), groups)
        self.of_weight[weight].add(rows)

    def _norm(self, moments: _Moments, _, mean, variance, weight, bias, training, momentum, eps) -> None:
        if training or mean is None:  # statistics of the batch itself
            return
        scale = (variance.double() + (1e-5 if eps is None else eps)).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        moments.scale, moments.shift = scale, (0 if bias is None else bias.double()) - mean.double() * scale


@torch.no_grad()
def output_rows(
    model: nn.Module, spaces: Sequence[ChannelSpace], tensors: Sequence[Sequence[Tensor]], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Rows [slots, slots] of each space, whose squared distances are those of its channels' outputs, E (y_i − y_j)².

    Of all producers (their weights are `tensors`, as `space.producers`), summed, and of all lanes of a slot; behind the
    batch norm that reads a producer's outputs, in eval mode, over all positions and images.

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
                with watch:
                    run(model, Inputs.of(batch))
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
                raise InputError(f"{'.'.join(ref.owners[0])} is not called on the batches in data")
            second = moments.second()
            total += sum(second[lane][:, lane] for lane in _positions(ref, moments.groups).T)
        values, vectors = torch.linalg.eigh(total)
        rows[space.name] = vectors * values.clamp(min=0).sqrt()
    layers = sum(map(len, tensors))
    log.info("outputs of %d layers measured on %d batches: %.1f s", layers, count, time.perf_counter() - started)
    return rows


def _positions(ref: Ref, groups: int) -> Tensor:
    """Channels of the output [slots, lanes]: a transposed conv of several groups names those of the first one."""
    return torch.cat([ref.index + group * ref.extent for group in range(groups)], 1)

"""Decisions: where a network chooses by order (the best boxes), rounding alone makes it choose others at near ties."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CHOOSING = {"aten::topk", "aten::sort", "aten::argmax", "aten::argmin", "torchvision::nms"}
CHOOSING_ALONG = {"aten::max", "aten::min"}  # with a dim


@dataclass
class Decision:
    """What was chosen, by which function, from what: all tensors that say so, and what else was asked."""

    name: str
    given: tuple[Tensor, ...]
    asked: tuple
    chosen: Tensor

    def is_like(self, other: "Decision") -> bool:
        """Whether as many are chosen, in the same way, from values of the same shape."""
        shapes, others = ([tensor.shape for tensor in one.given] for one in (self, other))
        return (self.name, self.asked, shapes) == (other.name, other.asked, others)


class Decisions(TorchDispatchMode):
    """Notes what a forward pass chooses by order.

    earlier  the notes of another pass: where as many are asked of values of the same shape it chooses the same
    """

    def __init__(self, earlier: Sequence[Decision] = ()):
        super().__init__()
        self.earlier, self.made = earlier, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name not in CHOOSING and not (name in CHOOSING_ALONG and func._overloadname == "dim"):
            return func(*args, **kwargs)
        named = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        given = tuple(value.detach().clone() for value in named.values() if isinstance(value, Tensor))
        asked = tuple((key, value) for key, value in named.items() if not isinstance(value, Tensor))
        made = Decision(name, given, asked, torch.empty(0))
        before = self.earlier[len(self.made)] if len(self.made) < len(self.earlier) else None
        if before is not None and before.is_like(made):
            out = _again(name, args[0], before.chosen.clone(), named)
        else:
            out = func(*args, **kwargs)
        made.chosen = (out[1] if isinstance(out, tuple) else out).clone()
        self.made.append(made)
        return out


def _again(name: str, given: Tensor, chosen: Tensor, named: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """What a function puts out that chooses as it did before."""
    if name in ("aten::topk", "aten::sort"):
        return given.gather(named.get("dim", -1), chosen), chosen
    if name in CHOOSING_ALONG:
        dim, keep = named["dim"], named.get("keepdim", False)
        values = given.gather(dim, chosen if keep else chosen.unsqueeze(dim))
        return (values if keep else values.squeeze(dim)), chosen
    return chosen

"""Decisions: where a network chooses by order (the best boxes), rounding alone makes it choose others at near ties."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CHOOSING = {"aten::topk", "aten::sort", "aten::argmax", "aten::argmin", "torchvision::nms"}
CHOOSING_ALONG = {"aten::max", "aten::min"}  # with a dim


@dataclass
class Decision:
    """What was chosen, by which function, from what."""

    name: str
    given: Tensor
    chosen: Tensor


class Decisions(TorchDispatchMode):
    """Notes what a forward pass chooses by order.

    earlier  the notes of another pass: of the same values, as far as they have the same shape, it chooses the same
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
        given = named["scores"] if name == "torchvision::nms" else args[0]
        number = len(self.made)
        before = self.earlier[number] if number < len(self.earlier) else None
        if before is not None and before.name == name and before.given.shape == given.shape:
            out = _again(name, given, before.chosen.clone(), named)
        else:
            out = func(*args, **kwargs)
        chosen = out[1] if isinstance(out, tuple) else out
        self.made.append(Decision(name, given.detach().clone(), chosen.clone()))
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

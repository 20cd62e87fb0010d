"""What becomes of labels where channels are picked by their number, and where a tensor is made for so many of them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from csgd.graph.labels import along, compact, wide_dims
from csgd.graph.ledger import Ledger
from csgd.graph.sizes import Size, channels_of, count, row, width_of

if TYPE_CHECKING:
    from csgd.graph.rules import Call

NO_RULE = "no rule for"
RANDOM = ("rand", "normal", "uniform", "bernoulli", "exponential")
SIZES = ("split_size_or_sections", "split_size", "split_sizes")


def pick(ledger: Ledger, call: "Call") -> str | None:
    """Parts of the channels are cut each for itself, where the numbers that say where they lie follow."""
    labels = ledger.canonical(ledger.labels(call.inputs[0]))
    parts = tree_leaves(call.on(labels))
    moves = [
        not torch.equal(compact(ledger.canonical(part)).reshape(-1), compact(labels).reshape(-1)) for part in parts
    ]
    apart = ledger.apart(labels) if any(moves) else []
    if len(apart) > 1 or (apart and not _counted(ledger, call, labels, apart[0])):
        ledger.pin_picked(labels, f"{call.name}: picks channels")
    for out, part, moved in zip(call.outputs, parts, moves, strict=True):
        if moved:
            ledger.part(part)
        ledger.label(out, part)
    return None


def _counted(ledger: Ledger, call: "Call", labels: Tensor, dim: int) -> bool:
    """Lets the numbers of a pick follow the channels along `dim`; False for a form that is not understood."""
    whole, ndim = row(labels, dim), labels.dim()
    if call.name in ("getitem", "setitem"):
        return _indexed(ledger, _index_of(call.args[1], ndim)[dim], whole, call.name)
    if call.name == "index_select":
        return _indexed(ledger, call.arg(2, "index"), whole, call.name)
    if call.name == "roll":
        return _rolled(ledger, call, whole, dim)
    position = 2 if "split" in call.name else 1
    along_dim = call.arg(position, "dim", 0)
    if call.name not in ("split", "split_with_sizes", "narrow", "select", "unbind") or along_dim % ndim != dim:
        return call.name in ("split", "split_with_sizes", "narrow", "select", "unbind")
    if call.name == "select":
        return _sliced(ledger, call.arg(2, "index"), whole, call.name)
    if call.name == "narrow":
        start, length = call.arg(2, "start"), call.arg(3, "length")
        if not isinstance(start, int) or start < 0:
            return False
        count(ledger, start, whole[:start], whole, call.name)
        count(ledger, length, whole[start : start + length], whole, call.name)
        return True
    if call.name == "unbind":
        return False
    sizes = next(given for key in SIZES if (given := call.arg(1, key)) is not None)
    parts = whole.split(sizes)
    if not isinstance(sizes, int):
        for number, part in zip(sizes, parts, strict=True):
            count(ledger, number, part, whole, call.name)
        return True
    for part in parts[1:]:  # all are so many, but for the last
        if len(part) == sizes:
            ledger.alike(parts[0], part)
        else:
            ledger.pin(part, f"{call.name}: picks channels that remain")
    count(ledger, sizes, parts[0], whole, call.name)
    return True


def _rolled(ledger: Ledger, call: "Call", whole: Tensor, dim: int) -> bool:
    """The same for a roll: its shift says how many channels come from the end to the front."""
    shifts, dims = ([one] if isinstance(one, int) else one for one in (call.arg(1, "shifts"), call.arg(2, "dims", ())))
    given = [shift for shift, along_dim in zip(shifts, dims, strict=True) if along_dim % call.inputs[0].dim() == dim]
    if len(given) != 1 or abs(given[0]) >= len(whole):
        return False
    (shift,) = given
    count(ledger, shift if shift > 0 else -shift, whole[-shift:] if shift > 0 else whole[:-shift], whole, call.name)
    return True


def _indexed(ledger: Ledger, index: Any, whole: Tensor, by: str) -> bool:
    """The same for what indexes the channels: a slice, a number, or a list of numbers, which a buffer may hold.

    Such a list does not follow: the channels stay up to the last one in it.
    """
    numbers = index.tolist() if isinstance(index, Tensor) and ledger.owns(index) else index
    if not isinstance(numbers, list | tuple | range) or not all(type(one) in (int, Size) for one in numbers):
        return _sliced(ledger, index, whole, by)
    places = [one % len(whole) for one in numbers]
    from_end = all(one < 0 for one in numbers)
    reason = "picks channels by a list of their numbers: chunk, flip, or slices by attributes free it"
    ledger.pin_picked(whole, f"{by}: {reason}", whole[min(places) :] if from_end else whole[: max(places) + 1])
    return True


def _sliced(ledger: Ledger, index: Any, whole: Tensor, by: str) -> bool:
    """The same for one index, or slice, of the channels."""
    if type(index) in (int, Size):
        index = slice(index, None if index == -1 else index + 1)
        stops = ()  # that of one channel is given by its start
    elif not isinstance(index, slice):
        return False
    else:
        stops = (index.stop,)
    step, n = 1 if index.step is None else int(index.step), len(whole)
    if step > 1:  # neighbours go together, so that there are as many between two that are picked
        start = 0 if index.start is None else index.start
        if n % step or not 0 <= start < step or index.stop is not None:
            return False
        ledger.clustered_alike(whole.view(-1, step), 1)
        return True
    for end in (index.start, *stops):
        if end is not None and end < 0:
            count(ledger, -end, whole[end:], whole, by)
        elif end is not None and end < n:
            count(ledger, end, whole[:end], whole, by)
    return True


def _index_of(index: Any, ndim: int) -> list[Any]:
    """What indexes each dim of a tensor."""
    index = index if isinstance(index, tuple) else (index,)
    dims = [part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in index]
    given = sum(n for n, part in zip(dims, index, strict=True) if part is not None and part is not Ellipsis)
    found: list[Any] = []
    for n, part in zip(dims, index, strict=True):
        if part is Ellipsis:
            found += [slice(None)] * (ndim - given)
        elif part is not None:
            found += [part] * n
    return found + [slice(None)] * (ndim - len(found))


def counted(ledger: Ledger, call: "Call", moved: Tensor) -> None:
    """Lets the integers of modules in the shape of a view follow what lies along their dim: channels, dims of a head,
    or heads.  What the view gives the width of other channels, or a part of it for each head, stays as wide."""
    first = call.arg(1, "dim") % call.inputs[0].dim() if call.name == "unflatten" else 0
    given = call.args[2:] if first or call.name == "unflatten" else call.args[1:]
    sizes = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    if call.name not in ("view", "reshape", "unflatten") or len(sizes) > moved.dim():
        return
    for dim, size in enumerate(sizes, first):
        if isinstance(size, Size) and size.is_held and dim in wide_dims(moved):
            if dim in ledger.apart(moved):
                atoms = ledger.dims(moved, dim)
                count(ledger, size, atoms, atoms, call.name)
            else:
                count(ledger, size, atoms := ledger.heads_of(ledger.lanes(moved, dim)), atoms, call.name)
        elif dim in wide_dims(moved) and (width := width_of(ledger, size)) is not None:
            ledger.same_width.append((width, compact(moved).reshape(-1)))


def setitem(ledger: Ledger, call: "Call") -> str | None:
    """What is written and what was there are the same channels, so that other views of the tensor stay right."""
    tensor, index, value = call.args
    if ledger.owns(tensor) or (labels := ledger.known(tensor)) is None:
        return NO_RULE
    apart = ledger.apart(labels)
    there = labels[index]
    if len(apart) > 1:
        return NO_RULE
    for dim in apart:
        where = _index_of(index, labels.dim())[dim]
        if not isinstance(where, slice) or not _counted(ledger, call, labels, dim):
            return NO_RULE
        if not torch.equal(row(labels, dim), row(labels, dim)[where]):
            ledger.part(there)
    if isinstance(value, Tensor) and value.numel() > 1:
        written = ledger.labels(value)
        one = compact(written).numel() == 1
        sizes = (1,) * (there.dim() - value.dim()) + tuple(value.shape)
        if not one or any(sizes[dim] > 1 for dim in ledger.apart(there)):
            ledger.same_channel(*torch.broadcast_tensors(compact(there), compact(written)))
    return None


def made_like(ledger: Ledger, call: "Call") -> str | None:
    """A tensor in the shape of another one has as many channels, in the same places; that of a vector, such as a bias,
    which follows them, has others of as many."""
    if len(call.inputs) > 1:
        return NO_RULE
    given = call.inputs[0]
    vector, known = ledger.owns(given) and given.dim() == 1 and given.numel() > 1, ledger.known(given) is not None
    for out in call.outputs:
        labels = ledger.labels(given) if vector or known else ledger.blank(out, _why(call))
        if vector:
            ledger.alike(labels, labels := ledger.fresh(len(labels)))
        ledger.label(out, labels)
        _noise(ledger, call, out)
    return None


def made(ledger: Ledger, call: "Call") -> None:
    """A tensor that is made for so many channels has these, where their number is one of an activation or a module."""
    args = call.args[1:] if call.name.startswith("new") else call.args
    sizes = call.kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    of_sizes = call.name.removeprefix("new_") in ("empty", "zeros", "ones", "full", "rand", "randn")
    for out in call.outputs:
        ledger.label(out, _of_sizes(ledger, out, sizes if of_sizes else (), _why(call)))
        _noise(ledger, call, out)


def _why(call: "Call") -> str:
    return f"meets what the network's code makes by {call.name}"


def _noise(ledger: Ledger, call: "Call", out: Tensor) -> None:
    """Noise is another one for each channel: as with dropout, that is left to the training, but not in eval mode."""
    drawn = any(kind in call.name for kind in RANDOM) and not ledger.training
    labels = ledger.known(out) if drawn else None
    if labels is not None and wide_dims(labels):
        ledger.pin(labels, f"{call.name}: noise that is drawn for each channel in eval mode too")


def _of_sizes(ledger: Ledger, out: Tensor, sizes: tuple[int, ...], reason: str) -> Tensor:
    dims = [dim for dim, size in enumerate(sizes) if isinstance(size, Size)] if len(sizes) == out.dim() else []
    dims.sort(key=lambda dim: (not sizes[dim].of_width, dim != (1 if out.dim() > 3 else out.dim() - 1)))
    for dim in dims:
        if (atoms := channels_of(ledger, sizes[dim])) is not None:
            return along(atoms, dim, out.dim())
    return ledger.blank(out, reason)


def spread(ledger: Ledger, call: "Call") -> str | None:
    """One value that is repeated for each of the channels of another tensor lies in the same places."""
    labels, out = ledger.labels(call.inputs[0]), call.outputs[0]
    ahead = (1,) * (out.dim() - labels.dim())
    before, placed = ahead + tuple(labels.shape), compact(labels).reshape(ahead + tuple(compact(labels).shape))
    new = [dim for dim in range(out.dim()) if before[dim] == 1 < out.size(dim)]
    if any(before[dim] < out.size(dim) for dim in wide_dims(placed)):
        return NO_RULE
    if compact(labels).numel() == 1:
        if call.name == "expand_as":
            other = compact(ledger.canonical(ledger.labels(call.inputs[1])))
            for dim in range(out.dim()):
                other = other if dim in new else other.narrow(dim, 0, 1)
            placed = other if wide_dims(other) else placed
        else:
            sizes = call.args[1] if len(call.args) == 2 and not isinstance(call.args[1], int) else call.args[1:]
            sizes = call.kwargs.get("size", call.kwargs.get("sizes", call.kwargs.get("repeats", sizes)))
            for dim in new:
                if isinstance(sizes[dim], Size) and (atoms := channels_of(ledger, sizes[dim])) is not None:
                    placed = along(atoms, dim, out.dim())
    ledger.label(out, placed)
    return None


def max_unpool(ledger: Ledger, call: "Call") -> None:
    """Values go where the indices say, channel by channel."""
    ndim, dim = call.inputs[0].dim(), call.inputs[0].dim() - int(call.name[-2]) - 1
    values, places = (ledger.channels(ledger.labels(tensor), dim) for tensor in call.inputs[:2])
    ledger.same_channel(values, places)
    ledger.label(call.outputs[0], along(values, dim, ndim))

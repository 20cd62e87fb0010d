"""What each torch function does to labels.

Data movement is *executed* on the labels, elementwise functions tie the channels of their operands, conv and
linear layers make new channels, norms follow.  A function without a rule pins everything that it touches: the
analysis may lose channels, never correctness.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from csgd.errors import InputError
from csgd.graph.labels import along, compact, wide_dims
from csgd.graph.ledger import Ledger
from csgd.graph.picks import counted, made, made_like, max_unpool, pick, setitem, spread
from csgd.graph.sizes import channels_of

# Values leave, or are written into, a tensor behind the tracer's back.
ESCAPES = {"setitem", "set", "numpy", "tolist", "array", "dlpack"}
CARRIED = {  # functions through which a sum of channels goes, or whose rule says what does not
    "view", "reshape", "ravel", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "permute", "transpose",
    "t", "movedim", "moveaxis", "swapaxes", "swapdims", "expand", "expand_as", "broadcast_to", "repeat",
    "repeat_interleave", "cat", "concat", "concatenate", "stack", "split", "chunk", "tensor_split",
    "split_with_sizes", "narrow", "select", "getitem", "unbind", "roll", "flip", "index_select", "contiguous", "clone",
    "detach", "to", "as_tensor", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "matmul", "rmatmul",
    "bmm", "einsum", "scaled_dot_product_attention", "unfold",
}  # fmt: skip
SCALED = {"mul", "rmul", "imul", "multiply", "neg"}  # so does it where a single tensor is large,
DIVIDED = {"div", "divide", "truediv", "itruediv", "true_divide"}  # and is what is divided
TINY = 1e-6  # the largest ε that nothing is as short as
PROPERTIES = {"T": "t", "mT": "transpose", "data": "detach"}


@dataclass
class Call:
    """One intercepted function call."""

    name: str
    func: Callable
    args: tuple
    kwargs: dict
    inputs: list[Tensor]
    outputs: list[Tensor]

    @classmethod
    def of(cls, func: Callable, args: tuple, kwargs: dict, out) -> "Call":
        name = getattr(func, "__name__", str(func)).strip("_")
        if name == "get":  # a property of a tensor
            name = PROPERTIES.get(func.__self__.__name__, "get")
        if (qualified := qualified_name(func)) in RULES:
            name = qualified
        if kwargs.get("out") is not None:  # written into: no label of it holds, and no rule knows
            name = f"{name} into out="
        inputs, outputs = ([t for t in tree_leaves(value) if isinstance(t, Tensor)] for value in ((args, kwargs), out))
        return cls(name, func, args, kwargs, inputs, inputs[:1] if name in ESCAPES else outputs)

    @property
    def carries(self) -> bool:
        """Whether a sum of channels goes through: values are moved, scaled alike, or the rule says itself."""
        alone = [tensor.numel() > 1 for tensor in self.inputs].count(True) == 1
        first = bool(self.args) and self.args[0] is self.inputs[0] and self.inputs[0].numel() > 1
        divided = self.name in DIVIDED and alone and first and not self.kwargs
        zeros = self.name == "pad" and not self.arg(3, "value")
        return self.name in CARRIED or zeros or (self.name in SCALED and alone) or divided

    def arg(self, position: int, key: str, default=None):
        return self.kwargs.get(key, self.args[position] if len(self.args) > position else default)

    def on(self, labels: Tensor | list[Tensor]):
        """The same data movement, executed on labels."""
        kwargs = {key: value for key, value in self.kwargs.items() if key not in ("input", "self", "tensors")}
        rest, kwargs = tree_map_only(Tensor, Tensor.cpu, (self.args[1:], kwargs))
        return self.func(labels, *rest, **kwargs)


def qualified_name(func: Callable) -> str:
    """The name of an operator as it was registered, 'mylib::scale'; '' of any other function."""
    schema = getattr(func, "_schema", None)
    return schema.name if schema is not None else getattr(func, "_qualified_op_name", "")


def apply_rule(ledger: Ledger, func: Callable, args: tuple, kwargs: dict, out) -> None:
    call = Call.of(func, args, kwargs, out)
    if not call.outputs:
        return
    if not call.inputs:
        return made(ledger, call)
    ledger.seen.update(map(id, call.inputs))
    if not call.carries:
        added = call.arg(2, "bias") if call.name.startswith(("linear", "conv")) else None
        for tensor in call.inputs:
            if tensor is not added:  # one that is computed, and summed as the rows that it is added to are
                ledger.work(tensor)
    try:
        if reason := RULES.get(call.name, unknown)(ledger, call):
            unknown(ledger, call, reason)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # a form of the call no rule foresaw
        unknown(ledger, call)


def unknown(ledger: Ledger, call: Call, reason: str = "no rule for") -> None:
    reason = f"{reason} {call.name}" if reason == "no rule for" else f"{call.name}: {reason}"
    for tensor in call.inputs:
        if ledger.owns(tensor):
            ledger.freeze(tensor, reason)
        elif tensor.numel() > 1:
            ledger.pin(ledger.labels(tensor), reason)
    first = call.inputs[0]
    for out in call.outputs:  # pinned labels pass through where they fit
        fits = out.shape == first.shape and not ledger.owns(first)
        atoms = ledger.labels(first) if fits else ledger.fresh(1, reason).view([1] * out.dim())
        ledger.label(out, atoms)


# values


def elementwise(ledger: Ledger, call: Call) -> None:
    tensors = call.inputs[:1] if call.name in ("to", "type_as") else call.inputs
    operands = [(ledger.labels(tensor), tensor) for tensor in tensors if tensor.numel() > 1]
    if operands:
        ledger.label(call.outputs[0], meet(ledger, operands, call.outputs[0].dim()))


def meet(ledger: Ledger, operands: list[tuple[Tensor, Tensor]], ndim: int) -> Tensor:
    """Channels that meet are the same channel; an operand that treats all channels alike ties nothing.

    operands  (labels, tensor) of each
    """
    result, shape, first = None, None, None  # shape: of the result, before broadcasting
    for labels, tensor in operands:
        labels, size = compact(labels), (1,) * (ndim - labels.dim()) + tuple(labels.shape)
        labels = labels.reshape((1,) * (ndim - labels.dim()) + tuple(labels.shape))
        if result is None:
            result, shape, first = labels, size, tensor
            continue
        ledger.learn(result, labels, shape, size)
        if wide_dims(result) and labels.numel() == 1 and _treats_alike(ledger, result, labels, size):
            _tie_what_differs(ledger, result, tensor, size)
        elif wide_dims(labels) and result.numel() == 1 and _treats_alike(ledger, labels, result, shape):
            _tie_what_differs(ledger, labels, first, shape)
            result = labels
        elif _tie_part(ledger, result, labels, size):
            pass
        elif _tie_part(ledger, labels, result, shape):
            result = labels
        else:
            result, labels = torch.broadcast_tensors(result, labels)
            ledger.same_channel(result, labels)
        shape = tuple(max(a, b) for a, b in zip(shape, size, strict=True))
    return result


def _treats_alike(ledger: Ledger, labels: Tensor, other: Tensor, size: tuple[int, ...]) -> bool:
    """Whether an operand of that size, without labels, treats all channels alike; or all heads, whose dims stay."""
    if all(size[dim] == 1 for dim in ledger.apart(labels)):
        return True
    heads = ledger.heads_apart(labels)
    if not heads or any(size[dim] > 1 for dim in heads):
        return False
    atom = other.reshape(-1)
    why = (reason for atoms, reason in ledger.pins if torch.isin(atom, atoms).any())
    ledger.pinned_dims.append((labels.reshape(-1), next(why, "meets a value of its own for each dim of a head")))
    return True


def _tie_part(ledger: Ledger, labels: Tensor, other: Tensor, size: tuple[int, ...]) -> bool:
    """Where channels are [heads, dims], ties another operand that has one for each dim, or one for each head, alone;
    whether it is of that kind."""
    dims, heads, wide = ledger.apart(labels), ledger.heads_apart(labels), set(wide_dims(other))
    if not (dims and heads and wide) or not set(dims).isdisjoint(heads):
        return False
    if wide <= set(dims) and all(size[dim] == 1 for dim in heads):
        ledger.slot.union(*torch.broadcast_tensors(labels, other))
    elif wide <= set(heads) and all(size[dim] == 1 for dim in dims):
        ledger.head.union(*torch.broadcast_tensors(labels, other))
        ledger.slot.union(other.reshape(-1)[:1].expand_as(other), other)
    else:
        return False
    return True


def _tie_what_differs(ledger: Ledger, labels: Tensor, other: Tensor, size: tuple[int, ...]) -> None:
    """Heads stay, all of them, where they meet what has a value for each of them: a mask that is expanded has not."""
    for dim in ledger.heads_apart(labels):
        if size[dim] > 1:
            values = other.reshape(size) if other.dim() < len(size) else other
            first = values.narrow(dim, 0, 1)
            if not torch.equal(first.expand_as(values), values):
                ledger.head.union(labels.narrow(dim, 0, 1).expand_as(labels), labels)


def pool(ledger: Ledger, call: Call) -> None:
    ndim = call.inputs[0].dim()
    spatial = int(call.name[-2]) if call.name.endswith("d") else ndim - 2
    dim = ndim - 1 - spatial
    atoms = ledger.channels(ledger.labels(call.inputs[0]), dim)
    for out in call.outputs:
        ledger.label(out, along(atoms, dim, ndim))


def sample(ledger: Ledger, call: Call) -> None:
    """Values at places, of every channel alike; what says where these are must stay."""
    for places in call.inputs[1:]:
        if not ledger.owns(places) and places.numel() > 1:
            ledger.pin(ledger.labels(places), f"{call.name}: says where values are taken")
    pool(ledger, call)


def reduce(ledger: Ledger, call: Call) -> None:
    """Mixes values; over the channels themselves only a mean leaves them free, on the condition of fact F12."""
    dims = call.arg(2 if "norm" in call.name else 1, "dim", call.kwargs.get("axis"))
    if isinstance(dims, Tensor):  # torch.max(a, b)
        return elementwise(ledger, call)
    labels = ledger.labels(call.inputs[0])
    ndim = labels.dim()
    if dims is None or isinstance(dims, bool):
        dims = range(ndim)
    dims = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)} or set(range(ndim))
    over_channels = _is_mean(call) and not dims.isdisjoint(ledger.apart(labels))
    mixed = None if over_channels else ledger.mixed(labels, dims)
    if over_channels:
        ledger.weigh(ledger.canonical(labels), dims, _told(ledger, call))
        mixed = ledger.fresh(1).view([1] * ndim)
    elif mixed is None:
        return unknown(ledger, call, "runs over the channels")
    labels = mixed
    if call.outputs[0].dim() < ndim:
        labels = labels.reshape([labels.size(dim) for dim in range(ndim) if dim not in dims])
    for out in call.outputs:
        ledger.label(out, labels)


def _is_mean(call: Call) -> bool:
    """Whether a reduction divides by the number of values: a variance does without Bessel's correction only."""
    if call.name == "mean":
        return True
    unbiased = next((value for value in call.args[1:3] if isinstance(value, bool)), call.kwargs.get("unbiased", True))
    return call.name in ("var", "std", "var_mean", "std_mean") and not call.kwargs.get("correction", unbiased)


def _told(ledger: Ledger, call: Call) -> str:
    """A function and the module in whose forward pass it is called."""
    path = ledger.paths.get(id(_calling(nn.Module)))
    return f"{call.name} in {path}" if path else call.name


def normalise(ledger: Ledger, call: Call) -> None:
    labels, dim = ledger.labels(call.inputs[0]), call.arg(2 if call.name == "normalize" else 1, "dim", 1)
    dims = range(labels.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    if call.name == "normalize" and len(dims) == 1 and dims[0] % labels.dim() in ledger.apart(labels):
        return _make_length_one(ledger, call, labels, dims[0])
    labels = ledger.mixed(labels, {d % labels.dim() for d in dims})
    if labels is None:
        return unknown(ledger, call, "runs over the channels")
    ledger.label(call.outputs[0], labels)


def _make_length_one(ledger: Ledger, call: Call, labels: Tensor, dim: int) -> None:
    """x / ‖x‖ over channels: where clusters have one size n, a cut makes each entry √n times as large, and leaves the
    product of two such vectors as it is."""
    if call.arg(1, "p", 2.0) != 2 or call.arg(3, "eps", 1e-12) > TINY:
        return unknown(ledger, call, "runs over the channels")
    inside = compact(ledger.canonical(labels))
    ledger.weigh(inside, [dim], _told(ledger, call))
    made = ledger.fresh(inside.numel()).view_as(inside)
    ledger.alike(inside, made)
    ledger.of_length_one.append((made.movedim(dim, -1).reshape(-1, made.size(dim)), call.name))
    ledger.label(call.outputs[0], made)


# data movement


def reshape(ledger: Ledger, call: Call) -> None:
    labels, out = ledger.canonical(ledger.labels(call.inputs[0])), call.outputs[0]
    if out.numel() != labels.numel():  # a view as another dtype
        return unknown(ledger, call)
    moved = ledger.canonical(labels.reshape(out.shape))
    wide = wide_dims(moved)
    if len(wide) > max(1, len(wide_dims(labels))):  # groups of channels: each loses as many, at the same places
        ledger.split(compact(moved))
    counted(ledger, call, moved)
    ledger.label(out, moved)


def move(ledger: Ledger, call: Call) -> None:
    labels, out = ledger.labels(call.inputs[0]), call.outputs[0]
    if call.func.__name__ == "__get__":
        moved = labels.transpose(-1, -2) if labels.dim() > 1 else labels
    else:
        moved = call.on(labels)
    ledger.label(out, moved)


def join(ledger: Ledger, call: Call) -> None:
    """Operands need equal sizes along every dim but that of the cat: channels that lie there are clustered alike.

    Empty ones (a cache at its start) have none.
    """
    parts = [ledger.labels(tensor) for tensor in call.inputs if tensor.shape != (0,)]
    dim = call.arg(1, "dim", 0) % max(1, parts[0].dim())
    for other in parts[1:]:
        ledger.learn(compact(parts[0]), compact(other), parts[0].shape, other.shape)
        if call.name == "stack" or dim not in {*wide_dims(parts[0]), *wide_dims(other)}:
            first, second = (compact(part) for part in (parts[0], other))
            ledger.alike(*torch.broadcast_tensors(first, second))
    ledger.label(call.outputs[0], call.on(parts))


def chunk(ledger: Ledger, call: Call) -> None:
    """Equal parts of the channels are clustered alike, so that chunk still cuts them in the right places.

    The last of k parts may be smaller: v < w channels beside w in each.  Clusters of one size n leave v / n and w / n,
    and chunk still takes ⌈((k − 1) w + v) / k n⌉ = w / n of them, since w − v < k.
    """
    labels = ledger.canonical(ledger.labels(call.inputs[0]))
    parts = call.on(labels)
    if call.arg(2, "dim", 0) % labels.dim() in wide_dims(labels):
        *equal, last = parts
        if len(wide_dims(labels)) > 1:
            return pick(ledger, call)
        if last.shape == parts[0].shape:
            equal = parts
        else:
            ledger.weigh(labels, [call.arg(2, "dim", 0)], _told(ledger, call))
            ledger.part(last)
        for first, second in pairwise(equal):
            ledger.alike(compact(first), compact(second))
    for out, part in zip(call.outputs, parts, strict=True):
        ledger.label(out, part)


def glu(ledger: Ledger, call: Call) -> None:
    a, b = ledger.labels(call.inputs[0]).chunk(2, call.arg(1, "dim", -1))
    ledger.same_channel(compact(a), compact(b))
    ledger.label(call.outputs[0], a)


def pixel_shuffle(ledger: Ledger, call: Call) -> None:
    # The labels go through as float64, which is exact for the number of atoms that fits in memory.
    moved = ledger.canonical(call.on(ledger.labels(call.inputs[0]).double()).long())
    ledger.label(call.outputs[0], ledger.channels(moved, moved.dim() - 3).view(-1, 1, 1))


def pixel_unshuffle(ledger: Ledger, call: Call) -> None:
    ledger.label(call.outputs[0], call.on(ledger.labels(call.inputs[0]).double()).long())


def channel_shuffle(ledger: Ledger, call: Call) -> None:
    atoms = ledger.channels(ledger.labels(call.inputs[0]), 1).view(call.arg(1, "groups"), -1)
    ledger.clustered_alike(atoms)
    ledger.label(call.outputs[0], along(atoms.t().reshape(-1), 1, call.inputs[0].dim()))


def unfold(ledger: Ledger, call: Call) -> str | None:
    """Windows of a tensor along a dim, or of an image: of each channel one entry for each position in a window."""
    labels, out = ledger.labels(call.inputs[0]), call.outputs[0]
    if call.func is not nn.functional.unfold:
        if call.arg(1, "dimension") % max(1, labels.dim()) in wide_dims(labels):
            return "no rule for"
        ledger.label(out, call.on(labels))
        return None
    atoms = ledger.channels(labels, labels.dim() - 3)
    ledger.label(out, along(atoms.repeat_interleave(out.size(-2) // len(atoms)), out.dim() - 2, out.dim()))
    return None


def fold(ledger: Ledger, call: Call) -> None:
    """The inverse, which sums where windows overlap."""
    labels, out = ledger.labels(call.inputs[0]), call.outputs[0]
    atoms = ledger.channels(labels, labels.dim() - 2).view(out.size(-3), -1)
    ledger.same_channel(atoms[:, :1].expand_as(atoms), atoms)
    ledger.label(out, along(atoms[:, 0], out.dim() - 3, out.dim()))


def _zeros(ledger: Ledger, n: int) -> Tensor:
    atoms = channels_of(ledger, n)
    return ledger.fresh(1, "zero-padded channels").expand(n) if atoms is None else atoms


def pad(ledger: Ledger, call: Call) -> None:
    """Padding with zeros adds channels (a shortcut that pads its own): as many as a module's integer says, or is the
    width of; others must stay."""
    labels = compact(ledger.canonical(ledger.labels(call.inputs[0])))
    pads, mode = call.arg(1, "pad"), call.arg(2, "mode", "constant")
    for i, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = labels.dim() - 1 - i
        if labels.size(dim) > 1 and (before or after):
            if mode != "constant" or min(before, after) < 0:
                return unknown(ledger, call)
            ends = [along(_zeros(ledger, n), dim, labels.dim()) for n in (before, after)]
            others = (*labels.shape[:dim], -1, *labels.shape[dim + 1 :])
            labels = torch.cat([ends[0].expand(others), labels, ends[1].expand(others)], dim)
    ledger.label(call.outputs[0], labels)


# layers


def _produced(ledger: Ledger, weight: Tensor, dim: int, n: int) -> Tensor:
    """The atoms of the channels a weight produces along `dim`: the same ones each time it is called."""
    if (id(weight), dim) not in ledger.outputs:
        ledger.outputs[id(weight), dim] = ledger.fresh(n)
    return ledger.outputs[id(weight), dim]


def _add_bias(ledger: Ledger, bias: Tensor | None, atoms: Tensor) -> None:
    """Of a layer, one entry per channel: a parameter, or one that is computed (put together of parts)."""
    known = None if bias is None or ledger.owns(bias) else ledger.known(bias)
    if known is None:
        return ledger.record(bias, 0, atoms, "follow")
    ledger.same_channel(ledger.channels(known, 0), atoms)


def conv(ledger: Ledger, call: Call) -> None:
    """Kernel [out, in / groups, ...], or [in, out / groups, ...] where transposed."""
    transposed = "transpose" in call.name
    x, weight, bias = call.arg(0, "input"), ledger.kernel(call.arg(1, "weight")), call.arg(2, "bias")
    groups = call.arg(6, "groups", 1)
    dim = x.dim() - weight.dim() + 1
    n = call.outputs[0].size(dim)
    if not ledger.owns(weight):
        known = ledger.known(weight) if n == groups == x.size(dim) else None
        if known is None or wide_dims(known) != [0]:
            return unknown(ledger, call, "its weight is not a plain parameter")
        ins = ledger.channels(ledger.labels(x), dim)  # a kernel for each channel that is computed (a blur)
        ledger.same_channel(ins, compact(known).reshape(-1))
        _add_bias(ledger, bias, ins)
        return ledger.label(call.outputs[0], along(ins, dim, x.dim()))
    ins = ledger.channels(ledger.labels(x), dim)
    if groups > 1 and groups == x.size(dim):
        if n == groups:
            outs = ins
        else:  # a multiplier: every input channel has several output channels, its lanes
            outs = _produced(ledger, weight, 0, n)
            ledger.alike(ins.repeat_interleave(n // groups), outs)
        ledger.record(weight, 0, ins if transposed else outs, "follow")
    else:
        outs = _produced(ledger, weight, int(transposed), n)
        if groups > 1:  # the groups are lanes
            ledger.clustered_alike(ins.view(groups, -1))
            ledger.clustered_alike(outs.view(groups, -1))
        ledger.record(weight, 0 if transposed else 1, ins if transposed else ins[: len(ins) // groups], "in")
        ledger.record(weight, 1 if transposed else 0, outs[: n // groups] if transposed else outs, "out")
    _add_bias(ledger, bias, outs)
    ledger.label(call.outputs[0], along(outs, dim, x.dim()))


def linear(ledger: Ledger, call: Call) -> None:
    x, weight, bias = call.arg(0, "input"), ledger.kernel(call.arg(1, "weight")), call.arg(2, "bias")
    if not ledger.owns(weight):
        return unknown(ledger, call, "its weight is not a plain parameter")
    labels = ledger.labels(x)
    ledger.learned(labels, -1, x.size(-1))
    if wide_dims(labels) and labels.dim() - 1 not in wide_dims(labels):
        ledger.freeze(weight, "linear over an axis that is not the channels'")
        return ledger.label(call.outputs[0], compact(labels))
    outs = _produced(ledger, weight, 0, weight.size(0))
    ledger.record(weight, 1, ledger.channels(labels, labels.dim() - 1), "in")
    ledger.record(weight, 0, outs, "out")
    _add_bias(ledger, bias, outs)
    ledger.label(call.outputs[0], outs)


def weight_norm(ledger: Ledger, call: Call) -> str | None:
    """g · v / ‖v‖, with a length in g for each entry along one dim: the kernel of a layer as it is called."""
    v, g = call.inputs
    if not (ledger.owns(v) and ledger.owns(g)):
        return "its kernel is not a plain parameter"
    if not g.dim():
        return "one length for the whole kernel (dim=None): dim=0 frees it"
    return None if ledger.norm(call.outputs[0], v, g) else "its lengths or its kernel have another use"


def addmm(ledger: Ledger, call: Call) -> str | None:
    """A linear layer whose weight is [in, out]."""
    bias, x, weight = call.inputs
    if not ledger.owns(weight):
        return "its weight is not a plain parameter"
    outs = _produced(ledger, weight, 1, weight.size(1))
    ledger.record(weight, 0, ledger.channels(ledger.labels(x), 1), "in")
    ledger.record(weight, 1, outs, "out")
    _add_bias(ledger, bias, outs)
    ledger.label(call.outputs[0], outs)
    return None


def embedding(ledger: Ledger, call: Call) -> str | None:
    """A table [words, channels] whose columns are filters."""
    weight = call.arg(1, "weight")
    if not ledger.owns(weight) or call.arg(3, "max_norm") is not None:
        return "its table is not a plain parameter"
    outs = _produced(ledger, weight, 1, weight.size(1))
    ledger.record(weight, 1, outs, "out")
    ledger.label(call.outputs[0], outs)
    return None


def _follow(ledger: Ledger, call: Call, first: int, keys: tuple[str, ...]) -> None:
    labels = ledger.labels(call.inputs[0])
    atoms = ledger.channels(labels, 1)
    for i, key in enumerate(keys):
        ledger.record(call.arg(first + i, key), 0, atoms, "follow")
    ledger.label(call.outputs[0], labels)


def batch_norm(ledger: Ledger, call: Call) -> None:
    _follow(ledger, call, 1, ("running_mean", "running_var", "weight", "bias"))
    if len(call.inputs) == 1:
        ledger.count(_calling(nn.modules.batchnorm._NormBase), ("num_features",), _channels_of(ledger, call))


def group_norm(ledger: Ledger, call: Call) -> None:
    """Per channel, or over groups of channels, whose number stays."""
    groups, channels = call.arg(1, "num_groups"), call.inputs[0].size(1)
    if groups != channels:
        ledger.weigh(_channels_of(ledger, call).view(groups, -1), [1], _told(ledger, call))
    _follow(ledger, call, 2, ("weight", "bias"))
    if len(call.inputs) == 1:
        attributes = ("num_groups", "num_channels") if groups == channels else ("num_channels",)
        ledger.count(_calling(nn.GroupNorm), attributes, _channels_of(ledger, call))


def _channels_of(ledger: Ledger, call: Call) -> Tensor:
    return ledger.channels(ledger.labels(call.inputs[0]), 1)


def _calling(kind: type[nn.Module]) -> nn.Module | None:
    """The layer of this kind in whose forward pass a function is called."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            return module if isinstance(module, kind) else None
        frame = frame.f_back
    return None


def layer_norm(ledger: Ledger, call: Call) -> None:
    """Over the last dims, layer_norm and rms_norm: over positions, or over channels, whose number is in a shape."""
    labels, shape = ledger.labels(call.inputs[0]), call.arg(1, "normalized_shape")
    first = labels.dim() - len(shape)
    normalised = [dim for dim in wide_dims(labels) if dim >= first]
    if len(normalised) > 1:
        return unknown(ledger, call, "normalises over several dims of channels")
    for dim in normalised:
        ledger.weigh(labels, range(first, labels.dim()), _told(ledger, call))
        atoms, module = ledger.dims(labels, dim), _calling(nn.Module)
        for tensor in call.inputs[1:]:
            ledger.record(tensor, dim - first, atoms, "follow")
        for attribute, value in vars(module).items() if module is not None else ():
            if value is shape:
                ledger.count(module, (attribute,), atoms, dim - first)
        if ledger.lanes(labels, dim).size(1) > 1:
            labels = _scaled_in_each_head(ledger, labels, dim, atoms, len(call.inputs) > 1)
    if not normalised:
        for tensor in call.inputs[1:]:
            ledger.freeze(tensor, f"{call.name} over positions")
    ledger.label(call.outputs[0], labels)


def _scaled_in_each_head(ledger: Ledger, labels: Tensor, dim: int, atoms: Tensor, has_weight: bool) -> Tensor:
    """Labels of what a norm over the dims of each head puts out: of keys a cut sums its weight and bias (fact F14)."""
    inside = compact(ledger.canonical(labels))
    made = ledger.fresh(inside.numel()).view_as(inside)
    ledger.alike(inside, made)
    if has_weight:
        ledger.scaled.append((made.movedim(dim, -1).reshape(-1, made.size(dim)), atoms))
    else:
        ledger.work_on(made)
    return made.expand(labels.shape)


def prelu(ledger: Ledger, call: Call) -> None:
    labels = ledger.labels(call.inputs[0])
    if call.inputs[1].numel() > 1:
        ledger.record(call.inputs[1], 0, ledger.channels(labels, 1), "follow")
    ledger.label(call.outputs[0], labels)


Rule = Callable[[Ledger, Call], str | None]

RULES: dict[str, Rule] = {
    name: rule
    for rule, names in {
        elementwise: """add sub rsub mul div rdiv truediv true_divide neg pow rpow sqrt rsqrt exp expm1 log log1p abs
            sign square reciprocal clamp clip clamp_min clamp_max maximum minimum where lerp addcmul addcdiv relu relu6
            leaky_relu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid hardswish hardtanh tanh tanhshrink
            hardshrink softshrink softplus softsign threshold rrelu erf sin cos dropout dropout1d dropout2d dropout3d
            alpha_dropout feature_dropout feature_alpha_dropout contiguous clone detach to type_as float double half
            bfloat16 masked_fill nan_to_num round floor ceil gt lt ge le eq ne iadd radd isub imul rmul itruediv
            rtruediv ipow isnan isinf isfinite logical_and logical_or logical_not logical_xor atan cpu
            zero fill type as_tensor""",
        sample: "roi_align roi_pool grid_sample grid_sampler",
        max_unpool: "max_unpool1d max_unpool2d max_unpool3d",
        pool: """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
            adaptive_max_pool3d lp_pool1d lp_pool2d lp_pool3d interpolate upsample""",
        reduce: """mean sum amax amin std var std_mean var_mean max min prod logsumexp median norm vector_norm
            linalg_vector_norm""",
        normalise: "softmax log_softmax softmin normalize cumsum cumprod",
        reshape: "view reshape ravel flatten unflatten squeeze unsqueeze view_as reshape_as",
        move: "permute transpose t movedim moveaxis swapaxes swapdims flip",
        join: "cat concat concatenate stack",
        spread: "expand expand_as broadcast_to repeat",
        made_like: """empty_like zeros_like ones_like full_like rand_like randn_like randint_like normal uniform
            bernoulli exponential""",
        made: "new_empty new_zeros new_ones new_full new_tensor",
        setitem: "setitem",
        pick: "split tensor_split split_with_sizes narrow select getitem unbind roll index_select",
        chunk: "chunk",
        glu: "glu",
        pixel_shuffle: "pixel_shuffle",
        pixel_unshuffle: "pixel_unshuffle",
        channel_shuffle: "channel_shuffle",
        unfold: "unfold",
        fold: "fold",
        pad: "pad",
        conv: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        linear: "linear",
        weight_norm: "weight_norm",
        addmm: "addmm",
        embedding: "embedding",
        batch_norm: "batch_norm instance_norm",
        group_norm: "group_norm",
        layer_norm: "layer_norm rms_norm",
        prelu: "prelu",
    }.items()
    for name in names.split()
}


def rule(name: str, like: str | None = None) -> Callable[[Rule], Rule]:
    """Teaches the analysis what a function does to channels; one without a rule pins everything that it touches.

    name  of the function as torch calls it: "erfc" of torch.erfc, the tensor method of this name, or F.erfc; or of an
          operator of your own as it was registered, "mylib::scale".  A function written in Python needs none: what it
          calls is followed.  An earlier rule of the same name is replaced.
    like  the function whose rule holds for this one too: csgd.rule("erfc", like="exp").  Else `rule` decorates a
          function of a ledger and a call:

        @csgd.rule("mylib::affine")  # affine(x, scale, shift): x[:, c] · scale[c] + shift[c]
        def affine(ledger, call):
            x, scale, shift = call.inputs
            channels = ledger.channels(ledger.labels(x), 1)
            ledger.record(scale, 0, channels, "follow")
            ledger.record(shift, 0, channels, "follow")
            ledger.label(call.outputs[0], ledger.labels(x))

    What a call knows: `inputs` and `outputs`, the tensors in the order of the arguments, and `arg(position, key,
    default)`.  Labels are integers in the shape of a tensor, which say to which channel each entry belongs.

        ledger.labels(tensor)             the labels of an operand
        ledger.channels(labels, dim)      one label for each position along a dim, [size of dim]
        ledger.label(tensor, labels)      of a result; what broadcasts to its shape: channels along dim 1 of four are
                                          channels.view(-1, 1, 1)
        ledger.fresh(n)                   labels of n new channels, for what a weight produces
        ledger.record(parameter, dim, channels, role)   dim of a parameter or buffer lies along channels: "out", the
                                          filters of a producer; "follow", one entry for each; "in", the input slices of
                                          a consumer, which a cut sums
        ledger.same_channel(a, b)         channels that meet, as those of a sum
        ledger.clustered_alike(labels, dim)   channels that are cut together: all that lie along dim
        ledger.weigh(labels, dims, by)    a mean over channels: clusters of one size (fact F12)
        ledger.pin(labels, reason)        channels that must stay

    A rule that returns a text pins everything that the call touches, for this reason.  A rule is no proof: the trial of
    `find_spaces`, and `prove`, cut and compare as ever, and pin what a rule has promised and does not hold.
    InputError if `like` has no rule.
    """
    if like is not None:
        if like not in RULES:
            raise InputError(f"rule: like='{like}' has no rule of its own")
        RULES[name] = RULES[like]

    def taught(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return taught

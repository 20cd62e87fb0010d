"""What products of activations do to labels: attention, fused and by hand (fact F14)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from csgd.graph.labels import along, compact, fold_constant_dims, wide_dims
from csgd.graph.ledger import Ledger, Product
from csgd.graph.picks import pick
from csgd.graph.rules import Call, Rule, _calling, _produced, meet, unknown

WEIGHTS = "that sums over channels with weights that are computed: whole heads may be free"


def product(ledger: Ledger, call: Call) -> None:
    """matmul and bmm, whatever broadcasts."""
    x, y = call.args[:2] if call.name != "rmatmul" else call.args[1::-1]
    if min(x.dim(), y.dim()) < 2:
        return unknown(ledger, call, "of a vector")
    batch = "abcdefgh"[: max(x.dim(), y.dim()) - 2]
    letters = f"{batch[len(batch) - x.dim() + 2 :]}xz", f"{batch[len(batch) - y.dim() + 2 :]}zy"
    _multiply(ledger, call, (x, y), letters, f"{batch}xy")


def einsum(ledger: Ledger, call: Call) -> None:
    """Of two operands."""
    inputs, _, out = call.args[0].replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(call.inputs) != 2 or "->" not in call.args[0]:
        return unknown(ledger, call, "of other than two operands")
    if "." in inputs:
        pairs = zip(call.inputs, letters, strict=True)
        most = [t.dim() - len(one.replace("...", "")) if "..." in one else 0 for t, one in pairs]
        dots = "0123456789"[: max(most)]
        letters = [one.replace("...", dots[len(dots) - n :]) for one, n in zip(letters, most, strict=True)]
        out = out.replace("...", dots)
    if any(len(set(one)) < len(one) for one in letters):
        return unknown(ledger, call, "along a diagonal")
    _multiply(ledger, call, tuple(call.inputs), tuple(letters), out)


def _multiply(ledger: Ledger, call: Call, tensors: tuple[Tensor, Tensor], letters: tuple[str, str], out: str) -> None:
    if any(map(ledger.owns, tensors)):
        return unknown(ledger, call, "with a parameter that no layer holds")
    operands = [Operand(ledger, ledger.labels(t), one, t) for t, one in zip(tensors, letters, strict=True)]
    ledger.label(call.outputs[0], multiplied(ledger, *operands, out, call.name))


class Operand:
    """Labels of one side of a product, each dim named by a letter.

    values  where heads have no labels, they tell whether all heads are alike
    """

    def __init__(self, ledger: Ledger, labels: Tensor, letters: str, values: Tensor):
        self.labels, self.letters, self.values = ledger.canonical(labels), letters, values
        self.wide = {letters[dim] for dim in wide_dims(self.labels)}

    def size(self, letter: str) -> int:
        return self.labels.size(self.letters.index(letter)) if letter in self.letters else 1

    def along(self, letters: str) -> Tensor:
        """[sizes], its labels with dims in that order; those in which they do not change have size 1"""
        labels = compact(self.labels)
        others = [dim for dim, letter in enumerate(self.letters) if letter not in letters]
        for dim in reversed(others):
            labels = labels.squeeze(dim)
        kept = [letter for letter in self.letters if letter in letters]
        labels = labels.permute([kept.index(letter) for letter in letters if letter in kept])
        return labels.reshape([self._compact(letter) for letter in letters])

    def _compact(self, letter: str) -> int:
        return self.size(letter) if letter in self.wide else 1

    def differs(self, letter: str) -> bool:
        """Whether it has no labels along a letter, but other values from place to place."""
        if letter in self.wide or self.size(letter) == 1:
            return False
        first = self.values.narrow(dim := self.letters.index(letter), 0, 1)
        return self.size(letter) != self.values.size(dim) or not torch.equal(first.expand_as(self.values), self.values)


def multiplied(ledger: Ledger, x: Operand, y: Operand, out: str, by: str, implied: bool = False) -> Tensor:
    """Labels, in the letters of `out`, of Σ x · y over the letters that both have and `out` has not.

    Where channels of both are summed over they are queries and keys; channels of one that stay are values, whose
    weights the other holds.  A letter that all have is that of the heads where channels lie along it.
    """
    wide, both = x.wide | y.wide, set(x.letters) & set(y.letters)
    heads = [letter for letter in out if letter in both & wide]
    summed = [letter for letter in both & wide if letter not in out]
    free = [[letter for letter in one.letters if letter in one.wide - both] for one in (x, y)]
    lost = any(letter not in out for one in free for letter in one)
    if len(heads) > 1 or len(summed) > 1 or lost or max(map(len, free)) > 1:
        return _pinned(ledger, (x, y), f"no rule for {by} of channels that lie along several dims")
    head = heads[0] if heads else ""
    result, letters = None, head
    if summed and {*summed} <= x.wide & y.wide and not any(free):
        queries, keys = torch.broadcast_tensors(*(one.along(head + summed[0]) for one in (x, y)))
        ledger.slot.union(queries, keys)
        ledger.products.append(Product(*(one.reshape(-1, one.size(-1)) for one in (queries, keys)), implied, by))
    elif not summed and sum(map(bool, free)) == 1:
        carrier, other = (x, y) if free[0] else (y, x)
        ledger.work_on(carrier.labels)
        result, letters = (
            carrier.along(head + free[0][0] if free[0] else head + free[1][0]),
            head + (free[0] or free[1])[0],
        )
        if head in other.wide and head not in carrier.wide:
            result = _for_each_head(ledger, result, other.size(head))
    elif summed or any(free):
        if not head:
            return _pinned(ledger, (x, y), f"no rule for {by} {WEIGHTS}")
        for one in (x, y):
            if one.wide & {*summed, *free[0], *free[1]}:
                ledger.work_on(one.labels)
                ledger.pinned_dims.append((compact(one.labels).reshape(-1), f"no rule for {by} {WEIGHTS}"))
    if head:
        rows = [one.along(head + "".join(sorted(one.wide - {head}))) for one in (x, y) if head in one.wide]
        rows += [result] if result is not None else []
        atoms = ledger.heads_of(*rows)
        ledger.heads.append(atoms)
        if x.differs(head) or y.differs(head):
            ledger.head.union(atoms[:1].expand_as(atoms), atoms)
        result = atoms if result is None else result
    elif result is None:
        result = ledger.fresh(1)
        letters = ""
    return _laid(result, letters, out, x, y)


def _pinned(ledger: Ledger, operands: tuple[Operand, ...], reason: str) -> Tensor:
    for one in operands:
        ledger.pin(one.labels, reason)
    return ledger.fresh(1, reason).reshape([1] * 0)


def _for_each_head(ledger: Ledger, labels: Tensor, heads: int) -> Tensor:
    """[heads, n] of values [1, n] that all heads share: each head's are other channels, lanes of the same slots."""
    atoms = ledger.fresh(heads * labels.size(-1)).view(heads, -1)
    ledger.slot.union(atoms, labels.expand_as(atoms))
    return atoms


def _laid(labels: Tensor, letters: str, out: str, x: Operand, y: Operand) -> Tensor:
    """Labels with dims `letters` in the dims of `out`."""
    if labels.dim() != len(letters):
        return labels.reshape([1] * len(out))
    order = [letters.index(letter) for letter in out if letter in letters]
    shape = iter(labels.permute(order).shape)
    return labels.permute(order).reshape([next(shape) if letter in letters else 1 for letter in out])


def attention(ledger: Ledger, call: Call) -> None:
    """softmax(q·kᵀ / √d + mask) · v, of grouped queries too: `scaled_dot_product_attention`."""
    q, k, v = (call.arg(i, key) for i, key in enumerate(("query", "key", "value")))
    if any(map(ledger.owns, (q, k, v))):
        return unknown(ledger, call, "of a parameter that no layer holds")
    mask, scale = call.arg(3, "attn_mask"), call.kwargs.get("scale")
    labels = [ledger.labels(t) for t in (q, k, v)]
    if call.kwargs.get("enable_gqa"):
        labels[1:] = [one.repeat_interleave(q.size(-3) // one.size(-3), -3) for one in labels[1:]]
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    batch = "abcdefgh"[: q.dim() - 2]
    queries, keys = Operand(ledger, labels[0], f"{batch}xz", q), Operand(ledger, labels[1], f"{batch}yz", k)
    scores = multiplied(ledger, queries, keys, f"{batch}xy", call.name, scale is None)
    shape = (*call.outputs[0].shape[:-1], k.size(-2))
    scores = scores.expand(shape)
    if isinstance(mask, Tensor) and mask.numel() > 1:
        scores = meet(ledger, [(scores, q), (ledger.labels(mask), mask)], len(shape)).expand(shape)
    alike = q.new_zeros(1).expand(shape)  # scores have labels for each head, or come of heads that have none
    weights, values = Operand(ledger, scores, f"{batch}xy", alike), Operand(ledger, labels[2], f"{batch}yz", v)
    ledger.label(call.outputs[0], multiplied(ledger, weights, values, f"{batch}xz", call.name))


def multi_head(ledger: Ledger, call: Call) -> None:
    """torch's nn.MultiheadAttention: queries, keys and values of one weight [3 heads · dims, stream] or of three.

    The heads' dims together are as wide as the stream of the queries, in its code.
    """
    names = [
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
        "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    ]  # fmt: skip
    given = {name: call.arg(i, name) for i, name in enumerate(names)}
    parts = [call.kwargs.get(f"{one}_proj_weight") for one in "qkv"]
    separate, extra = call.kwargs.get("use_separate_proj_weight"), (given["bias_k"], given["bias_v"])
    weights = parts if separate else [given["in_proj_weight"]]
    if not all(map(ledger.owns, (*weights, given["out_proj_weight"]))) or extra != (None, None):
        return unknown(ledger, call, "with bias_k, or weights that are computed")
    streams = [ledger.channels(ledger.labels(given[name]), given[name].dim() - 1) for name in names[:3]]
    made = [_produced(ledger, weight, 0, len(weight)) for weight in weights]
    for weight, stream in zip(weights if separate else weights * 3, streams, strict=True):
        ledger.record(weight, 1, stream, "in")
    for weight, atoms in zip(weights, made, strict=True):
        ledger.record(weight, 0, atoms, "out")
    together = torch.cat(made)
    ledger.record(given["in_proj_bias"], 0, together, "follow")
    split = together.view(3, int(given["num_heads"]), -1)
    ledger.split(split)
    queries, keys, values = split.unbind()
    ledger.slot.union(queries, keys)
    ledger.products.append(Product(queries, keys, True, call.name))
    atoms = ledger.heads_of(queries, keys, values)
    ledger.heads.append(atoms)
    ledger.same_width.append((streams[0], values.reshape(-1)))
    ledger.work_on(values)
    outs = _produced(ledger, given["out_proj_weight"], 0, len(given["out_proj_weight"]))
    ledger.record(given["out_proj_weight"], 1, values.reshape(-1), "in")
    ledger.record(given["out_proj_weight"], 0, outs, "out")
    ledger.record(given["out_proj_bias"], 0, outs, "follow")
    if (module := _calling(nn.MultiheadAttention)) is not None:
        ledger.count(module, ("num_heads",), atoms)
        ledger.count(module, ("head_dim",), ledger.dims(queries, 1))
    ledger.label(call.outputs[0], outs.view([1] * (call.outputs[0].dim() - 1) + [-1]))
    if len(call.outputs) > 1:
        shown = call.outputs[1]
        if call.kwargs.get("average_attn_weights", True):
            ledger.weigh(atoms[None], [1], call.name)
            return ledger.label(shown, ledger.fresh(1).view([1] * shown.dim()))
        ledger.label(shown, along(atoms, shown.dim() - 3, shown.dim()))


def repeat(ledger: Ledger, call: Call) -> None:
    """repeat_interleave: keys and values of grouped queries."""
    ledger.label(call.outputs[0], call.on(ledger.labels(call.inputs[0])))


def take(ledger: Ledger, call: Call) -> None:
    """Whole lanes (the queries of a stack of queries, keys and values), or rows of a table of one entry for each head;
    any other pick is that of `pick`."""
    given = call.inputs[0]
    if ledger.owns(given):
        return _look_up(ledger, call)
    dims, labels = _picked(call), ledger.canonical(ledger.labels(given))
    if dims is None or not all(dim < labels.dim() for dim in dims):
        return pick(ledger, call)
    moved = [ledger.canonical(part) for part in _leaves(call.on(labels))]
    if not all(torch.equal(_pattern(ledger, part), _pattern(ledger, labels)) for part in moved):
        return pick(ledger, call)
    atoms = compact(labels)
    for dim in dims:
        ledger.head.union(atoms.narrow(dim, 0, 1).expand_as(atoms), atoms)
    for out, part in zip(call.outputs, moved, strict=True):
        ledger.label(out, part)


def _leaves(value) -> Iterator[Tensor]:
    return iter(value) if isinstance(value, tuple | list) else iter((value,))


def _pattern(ledger: Ledger, labels: Tensor) -> Tensor:
    """The slots that occur, without the dims in which they do not change."""
    return compact(fold_constant_dims(ledger.slot.find(compact(labels)))).reshape(-1)


def _picked(call: Call) -> list[int] | None:
    """The dims along which unbind, select and getitem may leave something out; None where that is not to be seen."""
    if call.name != "getitem":
        return [call.arg(1, "dim", 0) % call.inputs[0].dim()]
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(one, Tensor | list | bool) for one in index):
        return None
    given, dims, dim = call.inputs[0].dim(), [], 0
    for one in index:
        if one is Ellipsis:
            dim = given - sum(other is not None and other is not Ellipsis for other in index[index.index(one) + 1 :])
        elif one is not None:
            dims += [] if one == slice(None) else [dim]
            dim += 1
    return dims


def _look_up(ledger: Ledger, call: Call) -> None:
    """table[index], of a table [places, heads]."""
    table, index = call.inputs[0], call.args[1] if call.name == "getitem" else None
    if not isinstance(index, Tensor) or table.dim() != 2 or table.size(1) < 2 or index.dtype is torch.bool:
        return pick(ledger, call)
    use = ledger.uses.get((id(table), 1))
    atoms = use[0] if use else ledger.fresh(table.size(1))
    ledger.record(table, 1, atoms, "follow")
    ledger.label(call.outputs[0], along(atoms, call.outputs[0].dim() - 1, call.outputs[0].dim()))


ATTENTION: dict[str, Rule] = {
    name: rule
    for rule, names in {
        product: "matmul rmatmul bmm",
        einsum: "einsum",
        attention: "scaled_dot_product_attention",
        multi_head: "multi_head_attention_forward",
        repeat: "repeat_interleave",
        take: "getitem select unbind",
    }.items()
    for name in names.split()
}

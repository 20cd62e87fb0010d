"""Channel spaces: sets of slots that occur alike in the same tensors, so that any two of them may merge."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from csgd.graph.kernels import kernel_of, layer_of
from csgd.graph.labels import UnionFind
from csgd.graph.ledger import Ledger, Product

PART = "part"  # of a use that no tensor has: the channels that are picked from among others


@dataclass
class Ref:
    """One dim of one parameter or buffer that the slots of a space index.

    owners  [(module path, attribute)], several where the tensor is shared
    dim     the indexed dim
    role    'out' filters of a producer | 'follow' one entry per channel | 'in' input slices of a consumer |
            'key' filters that the cut sums: those of keys, whose queries become equal (fact F14) |
            'length' entries of the g of a weight norm, w = g · v / ‖v‖, where v's are 'in': those of a cluster differ |
            'size' no tensor, but an integer that counts the channels, or entry `dim` of a tuple of them
    index   [slots, lanes] positions along `dim`
    extent  size of `dim` when the spaces were found: a tensor of another size has been cut since
    order   rank of this use in the forward pass
    power   a key's rows are multiplied by (slots after the cut / before) ** power: ½ where the scale of a product is
            the inverse root of the number of channels, which the cut changes
    lengths  owners of g where the tensor is the v of a weight norm
    """

    owners: list[tuple[str, str]]
    dim: int
    role: str
    index: Tensor
    extent: int
    order: int = 0
    power: float = 0.0
    lengths: Sequence[tuple[str, str]] = ()


class Kind(StrEnum):
    ONE_SIZE = "clusters of one size"
    ONLY_COLLAPSE = "only Collapse makes members equal"


@dataclass(frozen=True)
class Condition:
    """Something that must hold where a space is cut.

    kind     ONE_SIZE: a mean over channels weighs each by its copies, so all clusters count the same (fact F12);
             ONLY_COLLAPSE: training changes some rows not at all, so no pull but that of `Collapse` does (fact F11)
    why      the layers, or the tensors, that ask for it
    sizes    ONE_SIZE: what clusters of several members can count, the same in all `tied` spaces
    parts    ONE_SIZE: disjoint sets of slots, all slots of the space; no cluster goes across two of them
    tied     ONE_SIZE: names of the spaces that share the size, this one among them
    tensors  ONLY_COLLAPSE: names of the parameters and buffers that training does not change
    """

    kind: Kind
    why: str
    sizes: tuple[int, ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()
    tied: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind is Kind.ONLY_COLLAPSE:
            return f"{self.kind} ({self.why})"
        many = " or ".join(filter(None, (", ".join(map(str, self.sizes[:-1])), str(self.sizes[-1]))))
        groups = f" within each of {len(self.parts)} groups" if len(self.parts) > 1 else ""
        others = f", the same in {len(self.tied)} spaces" if len(self.tied) > 1 else ""
        return f"{self.kind}{groups}, {many}{others} ({self.why})"


@dataclass(repr=False)
class ChannelSpace:
    """Channels that are clustered together.

    name    module path of the pacesetter (first producer; a parameter of the network itself has its own name),
            with '#2', '#3' … where its channels fall into several spaces
    size    number of slots
    refs    every tensor dim that the slots index
    pinned  reasons why nothing of it may be trimmed; empty if it may
    conditions  what must hold for its cut to be exact
    """

    name: str
    size: int
    refs: list[Ref] = field(default_factory=list)
    pinned: list[str] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)

    @property
    def trimmable(self) -> bool:
        """Whether any of its channels may go."""
        return not self.pinned and self.size > 1

    @property
    def of_heads(self) -> bool:
        """Whether its slots are whole heads."""
        return "#heads" in self.name

    @property
    def producers(self) -> list[Ref]:
        """The pacesetter, and the followers that have filters of their own."""
        return [ref for ref in self.refs if ref.role == "out"]

    def __repr__(self) -> str:
        state = f"pinned: {'; '.join(self.pinned)}" if self.pinned else "trimmable" if self.trimmable else "one slot"
        state = ", ".join([state, *map(str, self.conditions if self.trimmable else ())])
        return f"<ChannelSpace {self.name}: {self.size} slots in {len(self.refs)} tensors, {state}>"


def describe(spaces: Sequence[ChannelSpace]) -> str:
    """The spaces as a table: slots, the layers whose filters move together, and whether they are free or why not."""
    rows = [("space", "slots", "moves together with", "free, or stays because")]
    for space in spaces:
        layers = (layer_of(path) for ref in space.producers for path, _ in ref.owners)
        with_it = dict.fromkeys(path for path in layers if path != space.name)
        free = "free" if not space.conditions else "; ".join(map(str, space.conditions))
        state = "; ".join(space.pinned) if space.pinned else free if space.trimmable else "one slot"
        rows.append((space.name, str(space.size), ", ".join(with_it) or "-", state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def spaces_of(ledger: Ledger, model: nn.Module) -> list[ChannelSpace]:
    """Groups the slots of a ledger into spaces, in the order in which the network first produces them; behind each of
    an attention the space of its whole heads, '…#heads'."""
    uses = uses_of(ledger)
    atoms, keys = _joined(ledger.heads), _keys(ledger)
    heads, of_scores = (ties.find(atoms).unique().numpy() for ties in (ledger.head, ledger.slot))
    within = _grouped(ledger, uses, ledger.slot, _reasons(ledger, ledger.slot, ledger.pinned_dims), keys)
    within = [group for group in within if not np.isin(group.slots, of_scores).any()]
    whole = _grouped(ledger, uses, ledger.head, _reasons(ledger, ledger.head), {}) if len(heads) else []
    whole = [group for group in whole if np.isin(group.slots, heads).all()]
    spaces, count = [], defaultdict(int)
    for group, of_heads in sorted(
        [(g, False) for g in within] + [(g, True) for g in whole], key=lambda one: one[0].order
    ):
        pacesetter = next((ref for ref in group.refs if ref.role == "out"), None)
        if pacesetter is None:
            continue
        pinned = group.pinned
        if not pinned and len(group.slots) == 1 and pacesetter.index.numel() > 1:
            pinned = ["its heads are all tied together" if of_heads else "all its channels are tied together"]
        if not pinned and not any(ref.role in ("in", "key") for ref in group.refs):
            pinned = ["no layer is seen to read its channels"]
        path, attribute = layer_of(pacesetter.owners[0][0]), pacesetter.owners[0][1]
        name = f"{path or attribute}#heads" if of_heads else path or attribute
        count[name] += 1
        name = f"{name}#{count[name]}" if count[name] > 1 else name
        spaces.append(ChannelSpace(name, len(group.slots), group.refs, pinned))
    return spaces + _uncovered(ledger, model, spaces)


def _joined(atoms: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.long, device="cpu"), *atoms])


class Group(NamedTuple):
    """Slots that occur alike."""

    slots: np.ndarray
    refs: list[Ref]
    pinned: list[str]
    order: tuple[int, int]  # use and position of the first entry


def _grouped(
    ledger: Ledger, uses: list["Use"], ties: UnionFind, reasons: dict[int, set[str]], keys: dict[int, bool]
) -> list[Group]:
    """The slots of one equivalence, those together that occur alike in the same uses.

    keys  {channel: whether its scale is implied} of those whose rows are summed
    """
    lengths = [len(use.atoms) for use in uses]
    slots = np.concatenate([ties.find(use.atoms).numpy() for use in uses]) if uses else np.empty(0, int)
    channels = np.concatenate([ledger.channel.find(use.atoms).numpy() for use in uses]) if uses else slots
    which, positions = (
        np.repeat(np.arange(len(uses)), lengths),
        np.concatenate([np.arange(n) for n in lengths] or [slots]),
    )

    by_slot = np.argsort(slots, kind="stable")  # of one slot: use after use, position after position
    names, starts = np.unique(slots[by_slot], return_index=True)
    stops = np.append(starts[1:], len(slots))
    lowest, highest = (extreme.reduceat(channels[by_slot], starts) for extreme in (np.minimum, np.maximum))
    summed = np.isin(channels, list(keys))
    alike = defaultdict(list)
    for k in np.argsort(by_slot[starts]):  # slots in the order of their first use
        entries = by_slot[starts[k] : stops[k]]
        pinned = int(names[k]) in reasons
        lanes = _lanes(channels[entries]) if lowest[k] < highest[k] else None
        alike[which[entries].tobytes(), lanes, pinned, summed[entries].tobytes()].append((int(names[k]), entries))

    groups = []
    for members in alike.values():
        entries = np.stack([of_slot for _, of_slot in members])
        refs = []
        for order in np.unique(which[entries[0]]):
            use, here = uses[order], which[entries[0]] == order
            for summing in (False, True):
                columns = here & (summed[entries[0]] == summing)
                if columns.any() and use.role != PART:
                    key = summing and use.role in ("out", "follow")
                    index = torch.from_numpy(positions[entries[:, columns]])
                    power = 0.5 * (key and any(keys[channel] for channel in channels[entries[0][columns]].tolist()))
                    role = "key" if key else use.role
                    extent = len(use.atoms)
                    refs.append(Ref(use.owners, use.dim, role, index, extent, int(order), power, use.lengths))
        pinned = sorted(set().union(*(reasons.get(slot, ()) for slot, _ in members)))
        first = int(which[entries[0, 0]]), int(positions[entries[0, 0]])
        groups.append(Group(np.array([slot for slot, _ in members]), refs, pinned, first))
    return groups


def _keys(ledger: Ledger) -> dict[int, bool]:
    """The channels whose rows a cut sums: of each product one side is what layers put out, but for its place and a
    scale, so that sums go through; the other side's become equal.  Their values: whether the scale is implied.

    Behind a norm in each head that is its weight and bias.  Where both sides are vectors of length one, all become
    equal and none is summed.  Where none of this is so, or the sides meet again in another part, the dims stay.
    """
    worked = set(ledger.channel.find(_joined(ledger.worked)).unique().tolist())
    weights = {}
    for rows, atoms in ledger.scaled:
        for row in ledger.channel.find(rows).tolist():
            weights.update(zip(row, ledger.channel.find(atoms).tolist(), strict=True))
    keys, equal = {}, set()
    for product in _of_any_length(ledger, worked):
        sides = [set(ledger.channel.find(atoms).unique().tolist()) for atoms in (product.keys, product.queries)]
        sides = [side | {weights[channel] for channel in side if channel in weights} for side in sides]
        plain = [worked.isdisjoint(side) and equal.isdisjoint(side) for side in sides]
        if plain[1] and not plain[0]:
            sides.reverse()
        summed, others = sides
        if not any(plain) or others & summed or others & keys.keys():
            reason = "a norm or angles (rotary) change queries and keys on the way to it: whole heads may be free"
            ledger.pinned_dims += [
                (product.keys, f"{product.by}: {reason}"),
                (product.queries, f"{product.by}: {reason}"),
            ]
            continue
        keys.update({channel: product.implied or keys.get(channel, False) for channel in summed})
        equal |= others
    return keys


def _of_any_length(ledger: Ledger, worked: set[int]) -> list[Product]:
    """The products but for those of two vectors of length one; pins what is read of such vectors in any other way."""
    groups = {tuple(row.tolist()): by for rows, by in ledger.of_length_one for row in ledger.channel.find(rows)}
    inside = {channel for group in groups for channel in group}
    others, misread = [], worked & inside
    for product in ledger.products:
        rows = [tuple(row.tolist()) for side in (product.keys, product.queries) for row in ledger.channel.find(side)]
        if not all(row in groups for row in rows):
            others.append(product)
            misread |= inside.intersection(chain(*rows))
    for group, by in groups.items():
        if not misread.isdisjoint(group):
            atoms = torch.tensor(group, device="cpu")
            heads = ledger.head.find(atoms)
            pins = ledger.pinned_dims if torch.equal(heads, heads[:1].expand_as(heads)) else ledger.pins
            pins.append((atoms, f"{by}: runs over the channels"))
    return others


class Use(NamedTuple):
    """One dim of a tensor, or an entry of a tuple of integers, and the atoms along it."""

    owners: list[tuple[str, str]]
    dim: int
    role: str
    atoms: Tensor
    lengths: Sequence[tuple[str, str]] = ()


def uses_of(ledger: Ledger) -> list[Use]:
    """Every use of channels, in the order of the forward pass."""
    lengths = {key: ledger.owners[id(g)] for key, g in ledger.lengths.items()}
    uses = [
        Use(ledger.owners[key], dim, role, atoms, lengths.get(key, ()))
        for (key, dim), (atoms, role) in ledger.uses.items()
    ]
    sizes = ledger.sizes.items()
    uses += [Use([(path, attribute)], entry, "size", atoms) for (path, attribute, entry), atoms in sizes]
    return uses + [Use([], 0, PART, atoms) for atoms in ledger.parts.values()]


def _lanes(channels: np.ndarray) -> bytes:
    """The channels of a slot numbered by first occurrence: lanes must match from use to use."""
    _, first, number = np.unique(channels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].tobytes()


def _reasons(ledger: Ledger, ties: UnionFind, more: Sequence[tuple[Tensor, str]] = ()) -> dict[int, set[str]]:
    """Slot -> why it must stay."""
    pins = [*ledger.pins, *more]
    pins += [(atoms, ledger.frozen[key]) for (key, _), (atoms, _) in ledger.uses.items() if key in ledger.frozen]
    reasons = defaultdict(set)
    for atoms, reason in pins:
        for slot in ties.find(atoms).unique().tolist():
            reasons[slot].add(reason)
    return reasons


def _uncovered(ledger: Ledger, model: nn.Module, spaces: list[ChannelSpace]) -> list[ChannelSpace]:
    """A pinned space without refs for every conv and linear layer that no space knows, and why."""
    own = (ref for space in spaces for ref in space.refs if ref.role not in ("in", "length"))
    covered = {layer_of(path) for ref in own for path, _ in ref.owners}
    missing = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            size = module.out_channels
        elif isinstance(module, nn.Linear):
            size = module.out_features
        else:
            continue
        if path in covered:
            continue
        weight = kernel_of(module)
        if weight is None:
            reason = "its weight is computed, not a plain parameter"
        else:
            reason = ledger.frozen.get(id(weight), "not called as a layer in the forward pass")
        missing.append(ChannelSpace(path, size, pinned=[reason]))
    return missing

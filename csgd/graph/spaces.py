"""Channel spaces: sets of slots that occur alike in the same tensors, so that any two of them may merge."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from csgd.graph.ledger import Ledger

PART = "part"  # of a use that no tensor has: the channels that are picked from among others


@dataclass
class Ref:
    """One dim of one parameter or buffer that the slots of a space index.

    owners  [(module path, attribute)], several where the tensor is shared
    dim     the indexed dim
    role    'out' filters of a producer | 'follow' one entry per channel | 'in' input slices of a consumer |
            'size' no tensor, but an integer that counts the channels, or entry `dim` of a tuple of them
    index   [slots, lanes] positions along `dim`
    extent  size of `dim` when the spaces were found: a tensor of another size has been cut since
    order   rank of this use in the forward pass
    """

    owners: list[tuple[str, str]]
    dim: int
    role: str
    index: Tensor
    extent: int
    order: int = 0


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
        with_it = dict.fromkeys(path for ref in space.producers for path, _ in ref.owners if path != space.name)
        free = "free" if not space.conditions else "; ".join(map(str, space.conditions))
        state = "; ".join(space.pinned) if space.pinned else free if space.trimmable else "one slot"
        rows.append((space.name, str(space.size), ", ".join(with_it) or "-", state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def spaces_of(ledger: Ledger, model: nn.Module) -> list[ChannelSpace]:
    """Groups the slots of a ledger into spaces, in the order in which the network first produces them."""
    reasons, uses = _reasons(ledger), uses_of(ledger)
    lengths = [len(atoms) for _, _, _, atoms in uses]
    slots = np.concatenate([ledger.slot.find(atoms).numpy() for *_, atoms in uses]) if uses else np.empty(0, int)
    channels = np.concatenate([ledger.channel.find(atoms).numpy() for *_, atoms in uses]) if uses else slots
    which, positions = (
        np.repeat(np.arange(len(uses)), lengths),
        np.concatenate([np.arange(n) for n in lengths] or [slots]),
    )

    by_slot = np.argsort(slots, kind="stable")  # of one slot: use after use, position after position
    names, starts = np.unique(slots[by_slot], return_index=True)
    stops = np.append(starts[1:], len(slots))
    lowest, highest = (extreme.reduceat(channels[by_slot], starts) for extreme in (np.minimum, np.maximum))
    alike = defaultdict(list)
    for k in np.argsort(by_slot[starts]):  # slots in the order of their first use
        entries = by_slot[starts[k] : stops[k]]
        pinned = int(names[k]) in reasons
        lanes = _lanes(channels[entries]) if lowest[k] < highest[k] else None
        alike[which[entries].tobytes(), lanes, pinned].append((int(names[k]), entries))

    spaces, count = [], defaultdict(int)
    for members in alike.values():
        entries = np.stack([of_slot for _, of_slot in members])
        of_use, first = np.unique(which[entries[0]], return_index=True)
        columns = np.split(positions[entries], first[1:], axis=1)
        refs = [
            Ref(owners, dim, role, torch.from_numpy(index.copy()), len(atoms), int(order))
            for order, index in zip(of_use, columns, strict=True)
            for owners, dim, role, atoms in [uses[order]]
            if role != PART
        ]
        pacesetter = next((ref for ref in refs if ref.role == "out"), None)
        if pacesetter is None:
            continue
        pinned = sorted(set().union(*(reasons.get(slot, ()) for slot, _ in members)))
        if not pinned and len(members) == 1 and pacesetter.index.numel() > 1:
            pinned = ["all its channels are tied together"]
        if not pinned and not any(ref.role == "in" for ref in refs):
            pinned = ["no layer is seen to read its channels"]
        path, attribute = pacesetter.owners[0]
        name = path or attribute
        count[name] += 1
        spaces.append(ChannelSpace(f"{name}#{count[name]}" if count[name] > 1 else name, len(members), refs, pinned))
    return spaces + _uncovered(ledger, model, spaces)


class Use(NamedTuple):
    """One dim of a tensor, or an entry of a tuple of integers, and the atoms along it."""

    owners: list[tuple[str, str]]
    dim: int
    role: str
    atoms: Tensor


def uses_of(ledger: Ledger) -> list[Use]:
    """Every use of channels, in the order of the forward pass."""
    uses = [Use(ledger.owners[key], dim, role, atoms) for (key, dim), (atoms, role) in ledger.uses.items()]
    sizes = ledger.sizes.items()
    uses += [Use([(path, attribute)], entry, "size", atoms) for (path, attribute, entry), atoms in sizes]
    return uses + [Use([], 0, PART, atoms) for atoms in ledger.parts.values()]


def _lanes(channels: np.ndarray) -> bytes:
    """The channels of a slot numbered by first occurrence: lanes must match from use to use."""
    _, first, number = np.unique(channels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].tobytes()


def _reasons(ledger: Ledger) -> dict[int, set[str]]:
    """Slot -> why it must stay."""
    pins = list(ledger.pins)
    pins += [(atoms, ledger.frozen[key]) for (key, _), (atoms, _) in ledger.uses.items() if key in ledger.frozen]
    reasons = defaultdict(set)
    for atoms, reason in pins:
        for slot in ledger.slot.find(atoms).unique().tolist():
            reasons[slot].add(reason)
    return reasons


def _uncovered(ledger: Ledger, model: nn.Module, spaces: list[ChannelSpace]) -> list[ChannelSpace]:
    """A pinned space without refs for every conv and linear layer that no space knows, and why."""
    covered = {path for space in spaces for ref in space.refs if ref.role != "in" for path, _ in ref.owners}
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
        weight = module._parameters.get("weight")
        if weight is None:
            reason = "its weight is computed, not a plain parameter"
        else:
            reason = ledger.frozen.get(id(weight), "not called as a layer in the forward pass")
        missing.append(ChannelSpace(path, size, pinned=[reason]))
    return missing

"""What must hold for the cut of a space to be exact: found in a ledger, and looked up by whoever cuts or pulls."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import gcd

import numpy as np
import torch
from torch import Tensor, nn

from csgd.graph.ledger import Ledger
from csgd.graph.spaces import ChannelSpace, Condition, Kind, Ref, uses_of
from csgd.graph.twin import dotted


def add_conditions(ledger: Ledger, spaces: Sequence[ChannelSpace]) -> None:
    """Gives each space the conditions that a ledger has noted, in place; pins those of which none can hold."""
    _ask_for_one_size(ledger, spaces)
    for space in spaces:
        still = [name for ref in space.refs if (name := _still(ledger, ref)) is not None]
        if still and space.trimmable:
            space.conditions.append(Condition(Kind.ONLY_COLLAPSE, _told(still), tensors=tuple(still)))


def _still(ledger: Ledger, ref: Ref) -> str | None:
    """The name of the tensor of `ref` if its rows are to become equal, and training does not change it."""
    tensor = ledger.tensor_of(ref.owners[0])
    if ref.role not in ("out", "follow") or tensor is None:
        return None
    still = not tensor.requires_grad if isinstance(tensor, nn.Parameter) else id(tensor) in ledger.constants
    return dotted(*ref.owners[0]) if still and not _equal_rows(tensor, ref) else None


def _equal_rows(tensor: Tensor, ref: Ref) -> bool:
    """Whether the kernels of all slots are equal as they are (a blur); vectors may be so before weights are loaded."""
    if tensor.dim() == 1:
        return False
    rows = tensor.detach().movedim(ref.dim, 0)[ref.index.to(tensor.device)]
    return torch.equal(rows, rows[:1].expand_as(rows))


def _told(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return ", ".join(names[:2] if more else names) + more


def _ask_for_one_size(ledger: Ledger, spaces: Sequence[ChannelSpace]) -> None:
    """Fact F12: a mean over channels weighs each by the number of its copies, so these must be equally many.

    All spaces under one mean are tied: they share the size of their clusters.  Of several means at once (the groups of
    a group norm) each keeps its number of values, so that no cluster goes across two of them.
    """
    space_of, slot_of, lane_of = _seats(ledger, spaces)
    classes, why = list(range(len(spaces))), defaultdict(dict)
    parts, beside = [np.zeros(space.size, int) for space in spaces], set()
    for roots, by in _means(ledger):
        inside = space_of[roots]
        under = np.unique(inside[inside >= 0]).tolist()
        for k in under:
            why[k].setdefault(by)
            classes = [classes[under[0]] if one == classes[k] else one for one in classes]
            where = inside == k
            groups = np.nonzero(where)[0] * (1 + lane_of.max()) + lane_of[roots[where]]
            parts[k] = _refined(parts[k], slot_of[roots[where]], groups)
        if (inside < 0).any():
            beside.update(under)
    for one in sorted({classes[k] for k in why}):
        together = [k for k in sorted(why) if classes[k] == one]
        free = beside.isdisjoint(together) and all(spaces[k].trimmable for k in together)
        _settle([spaces[k] for k in together], [parts[k] for k in together], [list(why[k]) for k in together], free)


def _settle(tied: list[ChannelSpace], parts: list[np.ndarray], why: list[list[str]], free: bool) -> None:
    """The condition of spaces that are tied, or the reason why they must stay; free where none must anyway."""
    counts = [np.bincount(of_slot) for of_slot in parts]
    most = gcd(*(int(n) for count in counts for n in count))
    sizes = [n for n in range(2, most + 1) if most % n == 0 and all(space.size // n > 1 for space in tied)]
    for space, of_slot, by in zip(tied, parts, why, strict=True):
        if not free and space.trimmable:
            space.pinned.append(f"{by[0]}: runs over channels of which some must stay")
        elif free and not sizes:
            space.pinned.append(f"{by[0]}: runs over channels that make no clusters of one size")
        elif free:
            groups = tuple(tuple(np.flatnonzero(of_slot == part).tolist()) for part in range(of_slot.max() + 1))
            names = tuple(one.name for one in tied)
            space.conditions.append(Condition(Kind.ONE_SIZE, _told(by), tuple(sizes), groups, names))


def _seats(ledger: Ledger, spaces: Sequence[ChannelSpace]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Space, slot and lane of every channel, by its representative atom; −1 of those that are in no space."""
    seats = tuple(np.full(len(ledger.channel), -1) for _ in range(3))
    uses = uses_of(ledger)
    for number, space in enumerate(spaces):
        if not space.refs:
            continue
        atoms = np.concatenate([uses[ref.order].atoms[ref.index].numpy() for ref in space.refs], 1)
        roots = ledger.channel.find(torch.from_numpy(atoms)).numpy()
        _, first, lanes = np.unique(roots[0], return_index=True, return_inverse=True)
        seats[0][roots] = number
        seats[1][roots] = np.arange(space.size)[:, None]
        seats[2][roots] = first[lanes]
    return seats


def _means(ledger: Ledger) -> Iterator[tuple[np.ndarray, str]]:
    """(channels [groups, n], by what) of every mean over more than one channel, each once."""
    seen = set()
    for atoms, by in ledger.means:
        roots = ledger.channel.find(atoms).numpy()
        key = by, roots.shape, roots.tobytes()
        if (roots != roots[:, :1]).any() and key not in seen:
            seen.add(key)
            yield roots, by


def _refined(parts: np.ndarray, slots: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The parts of a space's slots [slots], told apart further by the groups in which each occurs, and how often."""
    occurs = defaultdict(list)
    for slot, group in sorted(zip(slots.tolist(), groups.tolist(), strict=True)):
        occurs[slot].append(group)
    number: dict[tuple, int] = {}
    return np.array([number.setdefault((part, *occurs[slot]), len(number)) for slot, part in enumerate(parts.tolist())])


def one_size(space: ChannelSpace) -> Condition | None:
    """The condition of a space that asks for clusters of one size."""
    return next((condition for condition in space.conditions if condition.kind is Kind.ONE_SIZE), None)


def tied(spaces: Sequence[ChannelSpace]) -> list[list[ChannelSpace]]:
    """The trimmable spaces, those together whose clusters have one size."""
    together = defaultdict(list)
    for space in spaces:
        if space.trimmable:
            condition = one_size(space)
            together[condition.tied[0] if condition else space.name].append(space)
    return list(together.values())


def pin(spaces: Sequence[ChannelSpace], reasons: Mapping[str, str]) -> None:
    """Pins the spaces of these names, and those that are tied to one of them."""
    for space in spaces:
        if space.name in reasons:
            space.pinned.append(reasons[space.name])
    for space in spaces:
        condition = one_size(space)
        stay = next((name for name in condition.tied if name in reasons), None) if condition else None
        if stay is not None and space.trimmable:
            space.pinned.append(f"{condition.why}: {stay}, whose clusters must have the same size, must stay")


def broken(spaces: Sequence[ChannelSpace], clusters: Mapping[str, Sequence[Sequence[int]]]) -> Iterator[str]:
    """One line for each space whose clusters break its condition; slots that no cluster names stay alone."""
    sizes = {space.name: _sizes(space, clusters.get(space.name, ())) for space in spaces}
    for space in spaces:
        condition = one_size(space)
        if condition is None or space.name not in clusters:
            continue
        part_of = {slot: number for number, part in enumerate(condition.parts) for slot in part}
        across = any(len({part_of[slot] for slot in members}) > 1 for members in clusters[space.name])
        all_sizes = set().union(*(sizes[name] for name in condition.tied if name in sizes))
        if across or len(all_sizes) > 1:
            yield f"clusters.{space.name}: {condition}"


def _sizes(space: ChannelSpace, parts: Sequence[Sequence[int]]) -> set[int]:
    """The numbers of members that occur."""
    alone = space.size - sum(map(len, parts))
    return {len(members) for members in parts} | ({1} if alone else set())

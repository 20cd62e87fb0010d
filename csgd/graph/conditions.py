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
    classes, why = list(range(len(spaces))), defaultdict(dict)
    parts, beside = [np.zeros(space.size, int) for space in spaces], set()
    seats = {of_heads: _seats(ledger, spaces, of_heads) for of_heads in (False, True)}
    means = list(_means(ledger))
    for of_heads, (space_of, slot_of, lane_of) in seats.items():
        for roots, by in means:
            inside = space_of[roots]
            if of_heads:  # a mean within each head goes with it
                whole = (inside == inside[:, :1]).all(1) & (slot_of[roots] == slot_of[roots[:, :1]]).all(1)
                roots, inside = roots[~whole], inside[~whole]
            under = np.unique(inside[inside >= 0]).tolist()
            for k in under:
                why[k].setdefault(by)
                _tie(classes, under[0], k)
                where = inside == k
                groups = np.nonzero(where)[0] * (1 + lane_of.max()) + lane_of[roots[where]]
                parts[k] = _refined(parts[k], slot_of[roots[where]], groups)
            if (inside < 0).any():
                beside.update(under)
    for one in sorted({classes[k] for k in why}):
        together = [k for k in sorted(why) if classes[k] == one]
        free = beside.isdisjoint(together) and all(spaces[k].trimmable for k in together)
        _settle([spaces[k] for k in together], [parts[k] for k in together], [list(why[k]) for k in together], free)

    for stream, values in _of_same_width(ledger):
        by_dims, by_heads = (
            [_names(spaces, seats[of_heads][0], ledger, atoms) for atoms in (stream, values)]
            for of_heads in (False, True)
        )
        if not by_heads[0] and by_dims[0] != by_dims[1]:  # else cut alike; dims of heads beside others the trial judges
            share_width(spaces, by_dims[0], by_heads[1], by_dims[1])


def _names(spaces: Sequence[ChannelSpace], space_of: np.ndarray, ledger: Ledger, atoms: Tensor) -> list[str]:
    """The spaces in which these channels are."""
    return [spaces[k].name for k in np.unique(space_of[ledger.channel.find(atoms).numpy()]).tolist() if k >= 0]


def _of_same_width(ledger: Ledger) -> Iterator[tuple[Tensor, Tensor]]:
    """(stream, channels) that must be as many, each once, but for those of the same slots: they are cut alike."""
    seen = set()
    for pair in ledger.same_width:
        slots = [ties.find(atoms).unique() for ties in (ledger.slot, ledger.head) for atoms in pair]
        key = tuple(ledger.channel.find(atoms).numpy().tobytes() for atoms in pair)
        if key not in seen and not (torch.equal(*slots[:2]) and torch.equal(*slots[2:])):
            yield pair
        seen.add(key)


def _tie(classes: list[int], k: int, other: int) -> None:
    of_other = classes[other]
    classes[:] = [classes[k] if one == of_other else one for one in classes]


def _sizes_of(spaces: Sequence[ChannelSpace], parts: Sequence[np.ndarray], together: Sequence[int]) -> list[int]:
    """The sizes that clusters of several members can have in all of these spaces."""
    most = gcd(*(int(n) for k in together for n in np.bincount(parts[k])))
    return [n for n in range(2, most + 1) if most % n == 0 and all(spaces[k].size // n > 1 for k in together)]


def share_width(
    spaces: Sequence[ChannelSpace], stream: Sequence[str], heads: Sequence[str], dims: Sequence[str]
) -> None:
    """The heads of an attention are together as wide as its stream, before a cut and after: clusters have one size in
    the stream and among the heads, or, where heads cannot be as many fewer, among their dims.  The same for any other
    channels, `dims`, to which a view gives the width of a stream.

    In place; where neither can be, all of them stay.
    """
    of = {space.name: space for space in spaces}
    ways = [(heads, "whole heads"), (dims, "the dims of its heads")]
    before, possible = _common_sizes(of, stream), [_common_sizes(of, [*stream, *way]) if way else () for way, _ in ways]
    alone = any(of[name].size // n < 2 for n in possible[0][:1] for name in heads)  # one head would be left
    best = min((0, 1), key=lambda i: (not possible[i], before[:1] != possible[i][:1], i == 0 and alone))
    if not possible[best]:
        why = "an attention whose heads are together as wide as their stream, and cannot be cut with it"
        if not heads:
            why = "a view asks that other channels are as many, and they cannot be cut together"
        return pin(spaces, dict.fromkeys([one for one in (*stream, *heads, *dims) if of[one].trimmable], why))
    for name in ways[1 - best][0]:
        if of[name].trimmable:
            of[name].pinned.append(f"an attention as wide as its stream: {ways[best][1]} are cut with it")
    tied = _all_tied(of, [*stream, *ways[best][0]])
    for name in tied:
        condition = one_size(space := of[name])
        told = "as wide as the stream of its attention" if heads else "as many as other channels that a view names"
        why = condition.why if condition else told
        if condition is None or condition.tied != tuple(tied):
            parts = condition.parts if condition else (tuple(range(space.size)),)
            space.conditions = [one for one in space.conditions if one is not condition]
            space.conditions.insert(0, Condition(Kind.ONE_SIZE, why, possible[best], parts, tuple(tied)))


def _all_tied(of: Mapping[str, ChannelSpace], names: Sequence[str]) -> list[str]:
    """These spaces and all that share the size of their clusters, in the order of the forward pass."""
    tied = set(names).union(*(condition.tied for name in names if (condition := one_size(of[name]))))
    return [name for name in of if name in tied]


def _common_sizes(of: Mapping[str, ChannelSpace], names: Sequence[str]) -> tuple[int, ...]:
    """The sizes that clusters of several members can have in all of these spaces; none where one must stay."""
    spaces = [of[name] for name in _all_tied(of, names)]
    if not all(space.trimmable for space in spaces):
        return ()
    parts = [c.parts if (c := one_size(space)) else (range(space.size),) for space in spaces]
    most = gcd(*(len(part) for of_space in parts for part in of_space))
    fewest = [1 if space.of_heads else 2 for space in spaces]  # one head may be left, but not one channel under a norm
    left = [n for n in range(2, most + 1) if most % n == 0]
    return tuple(n for n in left if all(space.size // n >= least for space, least in zip(spaces, fewest, strict=True)))


def _settle(tied: list[ChannelSpace], parts: list[np.ndarray], why: list[list[str]], free: bool) -> None:
    """The condition of spaces that are tied, or the reason why they must stay; free where none must anyway."""
    sizes = _sizes_of(tied, parts, range(len(tied)))
    for space, of_slot, by in zip(tied, parts, why, strict=True):
        if not free and space.trimmable:
            space.pinned.append(f"{by[0]}: runs over channels of which some must stay")
        elif free and not sizes:
            space.pinned.append(f"{by[0]}: runs over channels that make no clusters of one size")
        elif free:
            groups = tuple(tuple(np.flatnonzero(of_slot == part).tolist()) for part in range(of_slot.max() + 1))
            names = tuple(one.name for one in tied)
            space.conditions.append(Condition(Kind.ONE_SIZE, _told(by), tuple(sizes), groups, names))


def _seats(ledger: Ledger, spaces: Sequence[ChannelSpace], of_heads: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Space, slot and lane of every channel, by its representative atom, in the spaces of whole heads or in the others;
    −1 of those that are in none."""
    seats = tuple(np.full(len(ledger.channel), -1) for _ in range(3))
    uses = uses_of(ledger)
    for number, space in enumerate(spaces):
        if not space.refs or space.of_heads != of_heads:
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

"""Channel spaces with a trial: what the rules cannot see (sizes typed into `forward`) is found by cutting a twin."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from csgd.graph import ChannelSpace, Ref, conditions, trace_spaces
from csgd.graph.integers import Integers, at_place, integers_of, like, replaced
from csgd.graph.twin import Outputs
from csgd.proof import Trial

NORMED = 4  # channels that a trial leaves to a norm: of two, a layer norm makes −1 and 1 whatever they are


def find_spaces(
    model: nn.Module,
    example: Any,
    trial: bool = True,
    *,
    examples: Sequence[Any] = (),
    unused: Sequence[str] = (),
    outputs: Outputs = None,
) -> list[ChannelSpace]:
    """The channel spaces of any network, in the order of the forward pass: which channels move together, in which
    tensors and dims, or why they must stay.

    example   what the network is called with, on its device: a tensor (batch of 2 or more), a tuple of inputs, or
              Inputs(x, task="a") where there are keywords
    trial     also cut a random float64 twin, and pin what that shows to be inexact
    examples  more of them, for the other ways into the network
    unused    patterns of layers that are never called: a layer that no example reaches pins what it may read
    outputs   what counts of the value that the network returns: a list of its keys, attributes or positions, or a
              function of it; what is returned beside it (features, for their shapes) may change.  All, by default

    The model and the examples are left as they were found, bit by bit, and so are random states.  Every conv and linear
    layer is in the list: one that cannot be trimmed belongs to a space with the reason in `pinned`.
    InputError if the network cannot be run on an example, or cannot be copied; it names the module.
    """
    spaces = trace_spaces(model, example, examples=examples, unused=unused, outputs=outputs, itself=not trial)
    return pin_failures(model, spaces, example, examples=examples, outputs=outputs) if trial else spaces


def pin_failures(
    model: nn.Module,
    spaces: list[ChannelSpace],
    example: Any,
    *,
    examples: Sequence[Any] = (),
    outputs: Outputs = None,
) -> list[ChannelSpace]:
    """Pins every trimmable space whose trial fails or shows nothing, in place, and returns the list.

    Random clusters are cut from a random float64 twin and its outputs compared, in eval and in train mode.  Where that
    makes a module raise, integers of its own that equal a width are taken to be that width, and follow the cut from
    then on, but for those without which it does as well.  Sets of spaces are halved until the failing ones are found.
    """
    followed: list[Ref] = []
    while clusters := random_clusters(spaces, ratio=None):
        trial = Trial(model, spaces, clusters, example, examples=examples, outputs=outputs)
        _, reason = trial.changes(clusters)
        while reason and trial.raised_in is not None and (more := follow_widths(model, spaces, trial.raised_in)):
            followed += more
            _, reason = trial.changes(clusters)
        if not reason or trial.raised_in is None:
            break
        if not (_join_dims(model, spaces, trial.raised_in) or _share_widths(model, spaces, trial.raised_in)):
            break
    else:
        return spaces
    inexact = reason = _leave_what_is_none(model, trial, followed, reason)
    keys = [ref for space in spaces if space.trimmable for ref in space.refs if ref.role == "key"]
    if reason and keys and trial.raised_in is None and _is_exact_turned(trial, keys):
        reason = None
    failing = dict(trial.failures(list(clusters), reason)) if reason else {}
    if turned := [ref for space in spaces if space.name in failing for ref in space.refs if ref.role == "key"]:
        _turn(turned)
        _, reason = trial.changes(clusters)
        failing = dict(trial.failures(list(clusters), reason)) if reason else {}
    left = [name for name in clusters if name not in failing]
    if left:
        failing |= dict.fromkeys(trial.unseen(left), "its trial cannot see it: no output depends on these channels")
    conditions.pin(spaces, failing)
    if inexact or failing:
        _leave_what_is_none(model, trial, followed)
    return spaces


def _turn(keys: list[Ref]) -> None:
    """The scale of a product is a number, or the inverse root of what a cut changes: takes it for the other one."""
    for ref in keys:
        ref.power = 0.5 - ref.power


def _is_exact_turned(trial: Trial, keys: list[Ref]) -> bool:
    """Whether all is exact once the scales of all keys are turned; else these are as they were."""
    _turn(keys)
    if trial.changes(trial.clusters)[1] is None:
        return True
    _turn(keys)
    return False


def _leave_what_is_none(model: nn.Module, trial: Trial, followed: list[Ref], reason: str | None = None) -> str | None:
    """Takes back the integers without which the cut is as exact: nothing says that they are widths, and where an
    example is short the largest length that a network takes is one that it does not come near.

    reason  why it is not exact with all of them; without those that it does not need to run it may be.  Returns why it
            still is not
    """
    free = [space for space in trial.spaces if space.trimmable]
    if not followed:
        return reason
    names, before = [space.name for space in free], [space.refs for space in free]
    alike = defaultdict(list)  # of one attribute of a class
    for ref in followed:
        ((path, attribute),) = ref.owners
        alike[type(model.get_submodule(path)), attribute, ref.dim].append(ref)
    for modes in (["eval"], [*trial.modes]):  # mostly eval mode says as much
        still, narrow = reason, trial.cut(names)
        for some in alike.values():
            ids, refs = {id(ref) for ref in some}, [space.refs for space in free]
            if not any(id(ref) in ids for held in refs for ref in held):
                continue
            for space in free:
                space.refs = [ref for ref in space.refs if id(ref) not in ids]
            said = [_say(narrow, ref, trial.model) for ref in some]
            why = trial.changes_by(narrow, modes)[1]
            if why and (still is None or trial.raised_in is not None):
                _give_back(free, refs)
                for ref, counted in zip(reversed(some), reversed(said), strict=True):
                    setattr(narrow.get_submodule(ref.owners[0][0]), ref.owners[0][1], counted)
            else:
                still = why
        taken = [space.refs for space in free] != before
        if not taken or trial.changes(names)[1] == still:
            break
        _give_back(free, before)
    else:  # what a network keeps from pass to pass makes it another one
        still = reason
    if still is not None:
        _give_back(free, before)
    return reason and still


def _say(model: nn.Module, ref: Ref, like: nn.Module) -> Integers:
    """Gives an integer of a module the value that another network has there; returns what was said before."""
    ((path, attribute),) = ref.owners
    module = model.get_submodule(path)
    said = getattr(module, attribute)
    value = at_place(getattr(like.get_submodule(path), attribute), ref.dim)
    setattr(module, attribute, replaced(said, ref.dim, value))
    return said


def _give_back(spaces: list[ChannelSpace], refs: list[list[Ref]]) -> None:
    for space, held in zip(spaces, refs, strict=True):
        space.refs = held


def follow_widths(model: nn.Module, spaces: list[ChannelSpace], path: str) -> list[Ref]:
    """Lets the integers of a module that equal a width in it follow the cut, and those of all modules of its class;
    what follows that did not."""
    found = []
    for where, module in like(model, path):
        followed = {(ref.owners[0], ref.dim) for space in spaces for ref in space.refs if ref.role == "size"}
        for attribute, place, value in integers_of(module):
            if ((where, attribute), place) not in followed:
                for space, ref in _of_width(spaces, where, value):
                    found.append(Ref([(where, attribute)], place, "size", ref.index, value, ref.order))
                    space.refs.append(found[-1])
    return found


def _join_dims(model: nn.Module, spaces: list[ChannelSpace], path: str) -> bool:
    """Makes one space of the dims of queries and keys and those of the values in an attention, and in all of its class,
    where there are as many: its code may take one for the other; whether there was any."""
    found = False
    for where, _ in like(model, path):
        inside = [
            space
            for space in spaces
            if space.trimmable and not space.of_heads and all(_within(ref, where) for ref in space.refs)
        ]
        for keys in [space for space in inside if any(ref.role == "key" for ref in space.refs)]:
            lanes = keys.producers[0].index.size(1)
            for values in [one for one in inside if one is not keys and one.size == keys.size and one in spaces]:
                if values.producers[0].index.size(1) == lanes and not (values.conditions or keys.conditions):
                    keys.refs += values.refs
                    spaces[:] = [space for space in spaces if space is not values]
                    found = True
    return found


def _within(ref: Ref, path: str) -> bool:
    return all(f"{owner}.".startswith(f"{path}." if path else "") for owner, _ in ref.owners)


def _share_widths(model: nn.Module, spaces: list[ChannelSpace], path: str) -> bool:
    """Ties the streams of an attention, and of all of its class, to its heads, where these are together as wide;
    whether there was any that was not tied.  A network of which a layer raises is no attention."""
    found = False
    for where, _ in like(model, path):
        if path and not where:
            continue
        within = [
            (space, ref)
            for space in spaces if space.trimmable
            for ref in space.refs
            if ref.role == "in" and _within(ref, where)
        ]  # fmt: skip
        heads = [(space, ref) for space, ref in within if space.of_heads]
        for width in {ref.extent for _, ref in heads}:
            inside = [ref.owners for _, ref in heads if ref.extent == width]
            whole = [space.name for space, ref in heads if ref.extent == width]
            dims = [s.name for s, ref in within if ref.owners in inside and not s.of_heads]
            stream = [s.name for s, ref in within if ref.extent == width and ref.owners not in inside]
            names = {*stream, *whole, *dims}
            conditioned = {
                frozenset(c.tied) if (c := conditions.one_size(s)) else s.name for s in spaces if s.name in names
            }
            if stream and len(conditioned) > 1:
                conditions.share_width(spaces, stream, whole, dims)
                found = True
    return found


def _of_width(spaces: list[ChannelSpace], path: str, width: int) -> list[tuple[ChannelSpace, Ref]]:
    """The trimmable spaces along the first dim of that size of a tensor in a module; several where it reads a cat."""
    within = [
        (space, ref)
        for space in spaces if space.trimmable
        for ref in space.refs
        if ref.role != "size" and ref.extent == width and f"{ref.owners[0][0]}.".startswith(f"{path}." if path else "")
    ]  # fmt: skip
    first = min(within, key=lambda pair: pair[1].order, default=None)
    return [] if first is None else [(s, r) for s, r in within if (r.owners, r.dim) == (first[1].owners, first[1].dim)]


def random_clusters(spaces: list[ChannelSpace], seed: int = 0, ratio: float | None = 0.5) -> dict[str, list[list[int]]]:
    """A random partition of every trimmable space into about ratio × size clusters, or a random number of them.

    At least two clusters, but for spaces of two slots, which become one.  Random numbers are at most half of the size,
    and differ among spaces of one size where there are enough: equal ones would hide that two must be equal.  Where the
    condition is clusters of one size, that is drawn, of those that leave enough channels for a norm to let something
    through, or the one nearest to 1 / ratio.
    """
    rng, clusters, taken = random.Random(seed), {}, defaultdict(set)
    for together in conditions.tied(spaces):
        if condition := conditions.one_size(together[0]):
            sizes, fewest = condition.sizes, min(map(len, condition.parts))
            roomy = [n for n in sizes if fewest // n >= NORMED] or [min(sizes)]
            size = rng.choice(roomy) if ratio is None else min(sizes, key=lambda n: abs(1 / n - ratio))
            clusters |= {space.name: _of_one_size(space, size, rng) for space in together}
            continue
        (space,) = together
        order = rng.sample(range(space.size), space.size)
        if ratio is None:
            allowed = range(2, max(3, (space.size + 1) // 2 + 1))
            wanted = rng.choice([n for n in allowed if n not in taken[space.size]] or allowed)
            taken[space.size].add(wanted)
        else:
            wanted = round(space.size * ratio)
        width = min(space.size - 1, max(2, wanted))
        parts = [[slot] for slot in order[:width]]
        for slot in order[width:]:
            rng.choice(parts).append(slot)
        clusters[space.name] = parts
    return clusters


def _of_one_size(space: ChannelSpace, size: int, rng: random.Random) -> list[list[int]]:
    clusters = []
    for part in conditions.one_size(space).parts:
        order = rng.sample(part, len(part))
        clusters += [order[start : start + size] for start in range(0, len(order), size)]
    return clusters

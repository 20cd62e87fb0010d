"""Channel spaces with a trial: what the rules cannot see (sizes typed into `forward`) is found by cutting a twin."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from csgd.graph import ChannelSpace, conditions, trace_spaces
from csgd.proof import Trial


def find_spaces(
    model: nn.Module,
    example: Any,
    trial: bool = True,
    *,
    examples: Sequence[Any] = (),
    unused: Sequence[str] = (),
) -> list[ChannelSpace]:
    """The channel spaces of any network, in the order of the forward pass: which channels move together, in which
    tensors and dims, or why they must stay.

    example   what the network is called with, on its device: a tensor (batch of 2 or more), a tuple of inputs, or
              Inputs(x, task="a") where there are keywords
    trial     also cut a random float64 twin, and pin what that shows to be inexact
    examples  more of them, for the other ways into the network
    unused    patterns of layers that are never called: a layer that no example reaches pins what it may read

    The model and the examples are left as they were found, bit by bit, and so are random states.  Every conv and linear
    layer is in the list: one that cannot be trimmed belongs to a space with the reason in `pinned`.
    InputError if the network cannot be run on an example, or cannot be copied; it names the module.
    """
    spaces = trace_spaces(model, example, examples=examples, unused=unused, itself=not trial)
    return pin_failures(model, spaces, example, examples=examples) if trial else spaces


def pin_failures(
    model: nn.Module, spaces: list[ChannelSpace], example: Any, *, examples: Sequence[Any] = ()
) -> list[ChannelSpace]:
    """Pins every trimmable space whose trial fails or shows nothing, in place, and returns the list.

    Random clusters are cut from a random float64 twin and its outputs compared, in eval and in train mode.  Sets of
    spaces are halved until the failing ones are found.
    """
    clusters = random_clusters(spaces, ratio=None)
    if not clusters:
        return spaces
    trial = Trial(model, spaces, clusters, example, examples=examples)
    _, reason = trial.changes(clusters)
    failing = dict(trial.failures(list(clusters), reason)) if reason else {}
    left = [name for name in clusters if name not in failing]
    if left:
        failing |= dict.fromkeys(trial.unseen(left), "its trial cannot see it: no output depends on these channels")
    conditions.pin(spaces, failing)
    return spaces


def random_clusters(spaces: list[ChannelSpace], seed: int = 0, ratio: float | None = 0.5) -> dict[str, list[list[int]]]:
    """A random partition of every trimmable space into about ratio × size clusters, or a random number of them.

    At least two clusters, but for spaces of two slots, which become one.  Random numbers are at most half of the size,
    and differ among spaces of one size where there are enough: equal ones would hide that two must be equal.  Where the
    condition is clusters of one size, that is drawn, or the one nearest to 1 / ratio.
    """
    rng, clusters, taken = random.Random(seed), {}, defaultdict(set)
    for together in conditions.tied(spaces):
        if condition := conditions.one_size(together[0]):
            sizes = condition.sizes
            size = rng.choice(sizes) if ratio is None else min(sizes, key=lambda n: abs(1 / n - ratio))
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

"""Hundreds of random small networks: what is called trimmable is cut exactly, in every mode, and nothing is touched."""

import math
import random
from dataclasses import astuple, dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import csgd
from csgd.graph import conditions
from csgd.trial import random_clusters
from tests.random_nets import RandomNet, drawn, example_of

EXACT, SHOWN = 1e-9, 1e-6


@dataclass
class Tally:
    """What became of some networks: how many there were, which analyses were refused, how many spaces were free; cuts
    that were made, those of them that were wrong, those whose control showed, spaces that only the proof caught, and
    those that it caught though nothing changes."""

    networks: int = 0
    refused: int = 0
    spaces: int = 0
    free: int = 0
    cut: int = 0
    wrong: int = 0
    shown: int = 0
    caught: int = 0
    accused: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def build(seed: int, traps: bool = True) -> RandomNet:
    torch.manual_seed(seed)
    return RandomNet(seed, traps)


@torch.no_grad()
def redrawn(seed: int, traps: bool) -> RandomNet:
    """The network of a seed in float64, with other weights and statistics, and without dropout."""
    net, generator = build(seed, traps).double(), torch.Generator().manual_seed(seed + 1)
    for p in net.parameters():
        values = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.copy_(values * (2 / p[0].numel()) ** 0.5 if p.dim() > 1 and p[0].numel() > 1 else 1 + 0.5 * values)
    for module in net.modules():
        for name in ("running_mean", "running_var"):
            if isinstance(statistic := getattr(module, name, None), Tensor):
                statistic.copy_(torch.rand(statistic.shape, generator=generator) + 0.5)
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
        if hasattr(module, "rate"):
            module.rate = 0.0
    return net


@torch.no_grad()
def outputs(net: RandomNet, modes: list[bool]) -> list[Tensor]:
    """All outputs in the mode that the network came in, in eval and in train mode, and in eval mode once more with the
    statistics that training left; each on inputs drawn anew and on constant ones."""
    generator, out = torch.Generator().manual_seed(7), []
    for training in (modes, False, True, False):
        for kind in ("drawn", "constant", "large"):
            for module, mode in zip(net.modules(), modes, strict=True):
                module.training = mode if training is modes else training
            image, mask = drawn(net, generator, batch=3, dtype=torch.float64)
            image = torch.full_like(image, 0.3) if kind == "constant" else image * (20 if kind == "large" else 1)
            given = csgd.Inputs.of(net.inputs(image, mask))
            torch.manual_seed(5)
            np.random.seed(5)
            random.seed(5)
            out += [t.clone() for t in tree_leaves(net(*given.args, **given.kwargs)) if isinstance(t, Tensor)]
    return out


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest change of an entry relative to the mean size of the finite entries of its tensor."""
    if [a.shape for a in before] != [b.shape for b in after]:
        return math.inf
    largest = 0.0
    for a, b in zip(before, after, strict=True):
        finite = a.isfinite()
        if not torch.equal(a[~finite], b[~finite]):
            return math.inf
        if finite.any():
            largest = max(largest, float((a - b)[finite].abs().max() / a[finite].abs().mean().clamp(min=1e-30)))
    return largest


def change_by_cut(seed: int, traps: bool, spaces, clusters, equal: bool) -> float:
    """What a cut changes, of members that are made equal or of those that are not."""
    modes = [module.training for module in build(seed, traps).modules()]
    wide, narrow = redrawn(seed, traps), redrawn(seed, traps)
    if equal:
        csgd.merge_equal(wide, spaces, clusters)
        csgd.merge_equal(narrow, spaces, clusters)
    csgd.trim(narrow, spaces, clusters, tolerance=1e-12 if equal else None)
    try:
        return difference(outputs(wide, modes), outputs(narrow, modes))
    except RuntimeError:  # sizes no longer fit
        return math.inf


def state_of(net: RandomNet, example) -> list:
    """All that the analysis has to leave as it is, to the bit."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    given = csgd.Inputs.of(example)
    tensors = [*net.parameters(), *net.buffers(), *given.tensors()]
    return [
        [(id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.numpy(force=True).tobytes()) for t in tensors],
        [(t.requires_grad, None if t.grad is None else t.grad.numpy().tobytes(), dict(vars(t))) for t in tensors],
        [(id(module), module.training, sorted(vars(module))) for module in net.modules()],
        [(id(hook), key) for m in net.modules() for name in hooks for key, hook in getattr(m, name).items()],
        [dict(kept) for module in net.modules() if (kept := getattr(module, "kept", None)) is not None],
        list(net.seen),
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        [str(part) for part in np.random.get_state()],
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    ]


def examined(seed: int, trial: bool = True) -> Tally:
    """One network: its spaces are found, proved with clusters in use and cut, and it is compared with itself by nothing
    that csgd compares with.  Without the trial it is one that the rules alone must see through."""
    net, example, tally = build(seed, trial), example_of(build(seed, trial), seed), Tally(networks=1)
    before, rng = state_of(net, example), random.Random(seed)
    try:
        spaces = csgd.find_spaces(net, example, trial)
    except csgd.InputError as error:
        print(f"seed {seed} is refused: {error}")
        assert net.lock is not None, f"seed {seed} need not be refused"
        assert state_of(net, example) == before, f"seed {seed}: a refusal leaves it as it was"
        return replace(tally, refused=1)
    tally.spaces, tally.free = len(spaces), sum(space.trimmable for space in spaces)
    clusters = random_clusters(spaces, seed, ratio=rng.choice([0.25, 0.5, 0.75]))
    left_out = [space.name for tied in conditions.tied(spaces) if rng.random() < 0.2 for space in tied]
    clusters = {name: parts for name, parts in clusters.items() if name not in left_out}
    proof = csgd.prove(net, spaces, clusters, example, seed=seed) if clusters else None
    assert state_of(net, example) == before, f"seed {seed} is left as it was"
    if proof is not None and proof.failing:
        tally.caught = len(proof.failing)
        tally.accused = int(change_by_cut(seed, trial, spaces, clusters, equal=True) <= EXACT)
        clusters = {name: parts for name, parts in clusters.items() if name not in proof.failing}
        proof = csgd.prove(net, spaces, clusters, example, seed=seed) if clusters else None
    if proof is not None:
        assert not proof.failing, f"seed {seed}: {proof}"
        change = change_by_cut(seed, trial, spaces, clusters, equal=True)
        control = change_by_cut(seed, trial, spaces, clusters, equal=False)
        tally.cut, tally.wrong = 1, int(not change <= EXACT)
        tally.shown = int(control > SHOWN and proof.control > SHOWN)
        if tally.wrong or not tally.shown:
            print(f"seed {seed}: changes by {change:.1e} (unequal members: {control:.1e}); the proof says: {proof}")
    return tally


def examine(seeds: range, trial: bool = True) -> Tally:
    """Adds up the networks of some seeds, which pass only if many of their spaces are free."""
    torch.set_num_threads(1)
    tally = sum((examined(seed, trial) for seed in seeds), Tally())
    print(tally)
    assert tally.wrong == 0
    assert tally.free >= 0.5 * tally.spaces, "of which a sixth are outputs"
    assert tally.cut >= 0.9 * (tally.networks - tally.refused)
    assert tally.shown >= tally.cut - max(1, 0.02 * tally.cut), "unequal members show, but for dead channels"
    assert tally.accused <= 0.02 * tally.networks
    return tally


@pytest.mark.parametrize("first", range(0, 40, 20))
def test_random_networks_are_cut_exactly_and_left_as_they_were(first):
    examine(range(first, first + 20))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_hundreds_of_random_networks_are_cut_exactly_and_left_as_they_were(first):
    examine(range(first, first + 50))


@pytest.mark.parametrize("first", range(1000, 1120, 40))
def test_the_rules_alone_suffice_where_nothing_is_typed_into_the_code(first):
    assert examine(range(first, first + 40), trial=False).caught == 0, "the trial hides nothing"

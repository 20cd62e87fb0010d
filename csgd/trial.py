"""The trial trim: whatever the rules cannot see (sizes typed into `forward`) is found by cutting a copy."""

import copy
import random
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from csgd.clusters import clustered_tensors
from csgd.errors import InputError
from csgd.graph import ChannelSpace, trace_spaces
from csgd.graph.tracer import keep_random_state, set_random_state, tensors_in, twin_of
from csgd.trim import cut, merge_equal

TOLERANCE = {True: 1e-8, False: 1e-3}  # relative change of an output above which a cut is not exact; True: in float64


def find_spaces(model: nn.Module, example, trial: bool = True) -> list[ChannelSpace]:
    """The channel spaces of any network, in the order of the forward pass: which channels move together, in which
    tensors and dims, or why they must stay.

    example  an input tensor (batch of 2 or more) or a tuple of inputs, on the model's device
    trial    also cut a random float64 copy, and pin what that shows to be inexact

    The model is left as it was found (mode, buffers, random state).  Every conv and linear layer is in the list: one
    that cannot be trimmed belongs to a space with the reason in `pinned`.
    """
    spaces = trace_spaces(model, example)
    return pin_failures(model, spaces, example) if trial else spaces


def pin_failures(model: nn.Module, spaces: list[ChannelSpace], example) -> list[ChannelSpace]:
    """Pins every trimmable space whose trial trim fails, in place, and returns the list.

    The trial runs on a float64 copy with random weights and statistics, in eval mode, and in train mode where that
    is deterministic.  Sets of spaces are halved until the failing ones are found.
    """
    trial = Trial(model, example)

    def search(group: list[ChannelSpace]) -> None:
        reason = trial.failure(spaces, {space.name for space in group})
        if reason and len(group) == 1:
            group[0].pinned.append(reason)
        elif reason:
            middle = len(group) // 2
            search(group[:middle])
            search(group[middle:])

    live = [space for space in spaces if space.trimmable]
    while live and trial.failure(spaces, {space.name for space in live}):
        search(live)
        left = [space for space in live if space.trimmable]
        if len(left) == len(live):  # they fail only together
            for space in live:
                space.pinned.append("its trial trim fails together with other spaces")
            left = []
        live = left
    return spaces


class Trial:
    """A float64 copy of a network with random weights, on which cuts can be tried.

    A network that cannot run in float64 is tried in the dtype that it has, and judged less sharply; one that random
    weights drive to infinity, with its own weights under noise.  InputError if it cannot be copied.
    """

    def __init__(self, model: nn.Module, example, seed: int = 0):
        self.seed = seed
        args = example if isinstance(example, tuple) else (example,)
        try:
            twin = twin_of(model)
        except Exception as error:
            raise InputError(
                f"the network cannot be copied for its trial trim ({error}); trial=False leaves it out"
            ) from None
        try:
            wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
            self._prepare(copy.deepcopy(twin).double(), wide, torch.float64)
        except Exception:  # whatever a network raises that was written for one dtype
            self._prepare(twin, args, torch.get_default_dtype())

    def _prepare(self, model: nn.Module, args: tuple, dtype: torch.dtype) -> None:
        self.model, self.args, self.dtype = model, args, dtype
        self.tolerance = TOLERANCE[dtype == torch.float64]
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        own = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
        randomise(model, self.seed)
        if not all(out.isfinite().all() for out in self.outputs(model, False) if out.is_floating_point()):
            noise = torch.Generator().manual_seed(self.seed)
            for key, value in model.state_dict().items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    factor = 1 + 0.3 * torch.rand(value.shape, generator=noise, dtype=torch.float64)
                    value.copy_(own[key] * factor.to(value))
        first, second = self.outputs(model, True, seed=1), self.outputs(model, True, seed=2)
        deterministic = relative_difference(first, second) == 0.0  # not so with stochastic depth and the like
        self.modes = (False, True) if deterministic else (False,)

    @torch.no_grad()
    def outputs(self, model: nn.Module, training: bool, seed: int = 0) -> list[Tensor]:
        """Outputs of a forward pass that leaves the running statistics as they are."""
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        default = torch.get_default_dtype()
        with keep_random_state(model):
            set_random_state(model, seed)
            try:
                torch.set_default_dtype(self.dtype)  # constants that `forward` makes are to fit
                args = tree_map_only(Tensor, Tensor.clone, self.args)
                out = list(tensors_in(model.train(training)(*args)))
            finally:
                torch.set_default_dtype(default)
        for buffer, saved in buffers:
            buffer.copy_(saved)
        return out

    def cut(self, spaces: list[ChannelSpace], clusters: dict, equal: bool) -> tuple[nn.Module, list[list[Tensor]]]:
        """A copy cut by `clusters`, and its outputs in each mode before the cut."""
        model = copy.deepcopy(self.model)
        if equal:
            merge_equal(model, spaces, clusters)
        before = [self.outputs(model, training) for training in self.modes]
        cut(model, clustered_tensors(model, spaces, clusters))
        return model, before

    def compare(self, model: nn.Module, before: list[list[Tensor]]) -> float:
        """Largest relative change of any output in any mode."""
        after = [self.outputs(model, training) for training in self.modes]
        return max(map(relative_difference, before, after))

    def change(self, spaces: list[ChannelSpace], clusters: dict, equal: bool = True) -> float:
        """Largest relative change of any output by cutting `clusters`, members made equal first (or not: the
        negative control)."""
        return self.compare(*self.cut(spaces, clusters, equal))

    def failure(self, spaces: list[ChannelSpace], names: Collection[str]) -> str | None:
        """Why the spaces `names` cannot all be cut at random, or None.

        Two draws, each with a width of its own for every space: equal widths would hide that two must be equal.
        """
        for seed in (self.seed, self.seed + 1):
            drawn = random_clusters(spaces, seed, ratio=None)
            model, before = self.cut(
                spaces, {name: parts for name, parts in drawn.items() if name in names}, equal=True
            )
            try:
                change = self.compare(model, before)
            except Exception as error:  # whatever the model raises when its sizes no longer fit
                return f"its trial trim raises {type(error).__name__}"
            if not change <= self.tolerance:
                return "its trial trim changes the output"
        return None


def random_clusters(spaces: list[ChannelSpace], seed: int = 0, ratio: float | None = 0.5) -> dict[str, list[list[int]]]:
    """A random partition of every trimmable space into about ratio × size clusters, or a random number of them.

    At least two clusters, but for spaces of two slots, which become one.
    """
    rng, clusters = random.Random(seed), {}
    for space in spaces:
        if space.trimmable:
            order = rng.sample(range(space.size), space.size)
            wanted = round(space.size * ratio) if ratio is not None else rng.randint(2, max(2, space.size - 1))
            width = min(space.size - 1, max(2, wanted))
            parts = [[slot] for slot in order[:width]]
            for slot in order[width:]:
                rng.choice(parts).append(slot)
            clusters[space.name] = parts
    return clusters


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random weights and statistics under which every channel matters: zero-initialised gammas would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 0
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values * (1.5 / fan_in) ** 0.5 if fan_in > 1 else 0.7 + 0.4 * values)
        for name, draw, scale, shift in (
            ("running_mean", torch.randn, 0.2, 0.0),
            ("running_var", torch.rand, 1.0, 0.5),
        ):
            statistic = module._buffers.get(name)
            if statistic is not None and statistic.is_floating_point():
                statistic.copy_(draw(statistic.shape, generator=generator) * scale + shift)


@torch.no_grad()
def relative_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest |a − b| over all pairs of tensors, relative to the largest |a| of the pair; inf if they do not fit."""
    if not before or len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=False)):
        return float("inf")
    changes = [
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-300))
        for a, b in zip(before, after, strict=True)
        if a.numel()
    ]
    return max((c if c == c else float("inf") for c in changes), default=0.0)

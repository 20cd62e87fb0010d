"""The proof of a cut before it is made: a float64 twin of the network, its members made equal, is cut and compared."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from csgd.blocks import CONVOLUTIONS, convolved
from csgd.clusters import Clusters, check_clusters, clustered_tensors
from csgd.errors import InputError
from csgd.graph import ChannelSpace, Inputs, conditions
from csgd.graph.decisions import Decision, Decisions
from csgd.graph.recurrent import GATES
from csgd.graph.twin import (
    Mode,
    Outputs,
    check_examples,
    check_has_values,
    dotted,
    gradients,
    keep_random_state,
    modes_of,
    outputs_in,
    raised_in,
    random_state,
    run,
    set_mode,
    set_random_state,
    shrink_images,
    twin_of,
)
from csgd.trim import cut

TOLERANCE = {torch.float64: 1e-8}  # change of an output above which a cut is not exact
ROUGH = 1e-3  # the same in another dtype
ROUNDING = 100  # times what rounding its inputs changes: a network that makes rounding grow is judged less sharply,
WORST = 1e-5  # but not below this
SOFT = 0.3  # the least ε of the batch norms of a twin
DROPOUTS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
}  # fmt: skip
ATTENTIONS = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}  # and the place of dropout_p
VISIBLE = 10  # times the tolerance: what a channel must matter for a cut of it to be judged


@dataclass(frozen=True)
class Proof:
    """What a twin says of a cut before anything is trained.

    changes    {"eval": …, "train": …}, and "own" where some modules alone are in train mode: the largest change of an
               output entry by the cut, relative to the median size of the entries of its tensor; None where the cut
               network draws more or fewer random numbers: there it ran, and its outputs kept their shapes
    control    the same for members that are not equal: what a cut that is not exact would have shown
    failing    {space name: why}, of the spaces whose cut is not exact
    tolerance  what a change must stay below
    dtype      of the twin: float64, but for a network that cannot run in it
    """

    changes: dict[str, float | None]
    control: float
    failing: dict[str, str]
    tolerance: float
    dtype: torch.dtype

    @property
    def change(self) -> float:
        """The largest change of any mode that could be compared."""
        return max((change for change in self.changes.values() if change is not None), default=math.inf)

    @property
    def exact(self) -> bool:
        """Whether the cut is proven: nothing fails, and the control shows that a failure would have been seen."""
        return not self.failing and self.change <= self.tolerance and self.control > VISIBLE * self.tolerance

    def __str__(self) -> str:
        changes = ", ".join(f"{mode} {'random' if c is None else f'{c:.1e}'}" for mode, c in self.changes.items())
        told = "exact" if self.exact else "not exact" if self.failing else "nothing was seen"
        reasons = "".join(f"; {name}: {reason}" for name, reason in self.failing.items())
        return f"{told}: outputs change by {changes} (unequal members: {self.control:.1e}){reasons}"


def prove(
    model: nn.Module,
    spaces: list[ChannelSpace],
    clusters: Clusters,
    example: Any,
    *,
    examples: Sequence[Any] = (),
    outputs: Outputs = None,
    seed: int = 0,
) -> Proof:
    """Proves, before a single step is trained, that cutting these clusters will not change what the network computes.

    A float64 twin with random weights and statistics and inputs drawn anew has the members of each cluster made equal,
    is cut, and is compared with itself before the cut, in eval and in train mode; a control with members that are not
    equal shows what a cut that changes the function would do.  The model and the example stay as they are.  `examples`
    and `outputs` as in `find_spaces`.
    InputError if the network cannot be copied, or cannot run on its example.
    """
    trial = Trial(model, spaces, clusters, example, examples=examples, outputs=outputs, seed=seed, controlled=True)
    names = [name for name, parts in clusters.items() if any(len(members) > 1 for members in parts)]
    changes, reason = trial.changes(names)
    failing = dict(trial.failures(names, reason)) if reason else {}
    return Proof(changes, trial.control(), failing, trial.tolerance, trial.dtype)


@dataclass
class Passes:
    """Forward passes of one network over all examples in one mode, what they chose by order, and the random states that
    they left."""

    outputs: list[Tensor]
    states: list[tuple]
    decisions: list[list[Decision]] = field(default_factory=list)

    def pairs(self, other: "Passes") -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of both, and the values of which both chose, which must agree since the choice is the same."""
        both = zip(chain(*self.decisions), chain(*other.decisions), strict=False)
        given = [pair for a, b in both if a.is_like(b) for pair in zip(a.given, b.given, strict=True)]
        return self.outputs + [a for a, _ in given], other.outputs + [b for _, b in given]


class _AsTried(TorchFunctionMode):
    """Dropout drops nothing: its masks have the shape of what is cut, and could not be compared.  Large convolutions
    are computed block by block."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            return convolved(func, *args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if name in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in GATES and len(args) == 9:
            args = (*args[:5], 0.0, *args[6:])  # dropout between layers
        if name in ATTENTIONS:
            place = ATTENTIONS[name]
            args, kwargs = (*args[:place], 0.0, *args[place + 1 :])[: len(args)], kwargs | {"dropout_p": 0.0}
            kwargs = kwargs if len(args) <= place else {k: v for k, v in kwargs.items() if k != "dropout_p"}
        return func(*args, **kwargs)


class Trial:
    """A float64 twin whose members are equal, and its outputs, with which those of every cut of it are compared.

    A network that cannot run in float64 is tried in the dtype that it has, and judged less sharply; one that random
    weights or inputs make fail, or drive to infinity, with its own under noise.  One that is `controlled` is also cut
    before its members are made equal.
    """

    def __init__(
        self,
        model: nn.Module,
        spaces: list[ChannelSpace],
        clusters: Clusters,
        example: Any,
        *,
        examples: Sequence[Any] = (),
        outputs: Outputs = None,
        seed: int = 0,
        controlled: bool = False,
    ):
        check_has_values(model)
        self.spaces, self.clusters, self.seed, self.controlled = spaces, clusters, seed, controlled
        self.outputs = outputs
        self.before: dict[str, Passes] = {}
        self.raised_in: str | None = None  # the module that the latest cut has made raise
        self._model, self._examples = model, [Inputs.of(one) for one in (example, *examples)]
        check_examples(self._examples)
        check_clusters(spaces, clusters)
        self._small = shrink_images(twin_of(model, Tensor.detach))
        try:
            self.model, self.unequal, self.before = self._first_that_runs()
        except InputError:
            if not self._small:
                raise
            self._small = False  # its code takes images of its own size alone
            self.model, self.unequal, self.before = self._first_that_runs()

    def _first_that_runs(self) -> tuple[nn.Module, Passes | None, dict[str, Passes]]:
        failed: InputError | None = None
        for dtype in (torch.float64, torch.float32):
            for weights, inputs in ((_random, _signed), (_random, _drawn), (_noisy, _drawn), (_noisy, _as_given)):
                self.dtype, self.tolerance = dtype, TOLERANCE.get(dtype, ROUGH)
                self._weights, generator = weights, torch.Generator().manual_seed(self.seed)
                self.inputs = [one.copied(partial(inputs, dtype, generator)) for one in self._examples]
                self._sizes = {}
                try:
                    model = self.twin()
                    unequal = self._cut(model, self.clusters) if self.controlled else None
                    self._make_equal(model, self.clusters)
                    wide = twin_of(model, Tensor.detach)  # what it keeps from pass to pass, the cut one is not to see
                    self.modes = modes_of(wide)
                    with self._fitting(wide) if weights is _random else nullcontext():  # eval is the first mode
                        before = {"eval": self.passes(wide, self.modes["eval"])}
                    before |= {name: self.passes(wide, mode) for name, mode in self.modes.items() if name != "eval"}
                except InputError as error:
                    failed = failed or error
                    continue
                held = [out for passes in before.values() for out in passes.outputs]
                infinite = weights is _noisy and not any(out.isnan().any() for out in held)  # masked, not overflown
                if infinite or all(out.isfinite().all() for out in held):
                    return model, None if unequal is None else self._unequal(unequal), before
        raise failed or InputError("the network cannot be tried: its outputs are not numbers (NaN)")

    def twin(self) -> nn.Module:
        """A copy of the network with the weights of this trial, the same ones each time."""
        generator = torch.Generator().manual_seed(self.seed)
        model = twin_of(self._model, partial(self._weights, self.dtype, generator))
        if self._small:
            shrink_images(model)
        if self._weights is _random:
            _randomise_statistics(model, generator)
            _soften(model)
            for path, size in self._sizes.items():
                _scale_statistics(model.get_submodule(path), size)
        return model

    @contextmanager
    def _fitting(self, model: nn.Module) -> Iterator[None]:
        """Makes the running statistics of each layer as large as the values that it is the first time called with, in
        place: else these grow from layer to layer, and rounding with them.  What they are then is known in `_sizes`."""
        fitted: set[int] = set()  # two layers may share them

        @torch.no_grad()
        def fit(path: str, module: nn.Module, args: tuple) -> None:
            handles.pop(path).remove()  # a layer that is called again keeps them
            values = next((arg for arg in args if isinstance(arg, Tensor)), None)
            size = float(values.square().mean()) if values is not None else 0.0
            own = {id(statistic) for statistic in _statistics(module).values()}
            if 0 < size < math.inf and fitted.isdisjoint(own):
                self._sizes[path] = size
                _scale_statistics(module, size)
                fitted.update(own)

        handles = {
            path: module.register_forward_pre_hook(partial(fit, path))
            for path, module in model.named_modules()
            if _statistics(module) and not isinstance(module, torch.jit.ScriptModule)  # which take no hooks
        }
        try:
            yield
        finally:
            for handle in handles.values():
                handle.remove()

    @torch.no_grad()
    def _make_equal(self, model: nn.Module, clusters: Clusters) -> None:
        """Every member becomes its representative: of random weights the mean would do no better."""
        for t in clustered_tensors(model, self.spaces, clusters, for_cut=False):
            if t.becomes_equal:
                dim, segments = t.merged
                others = (segments != torch.arange(len(segments), device="cpu")).nonzero().flatten()
                to, of = others.to(t.tensor.device), segments[others].to(t.tensor.device)
                rows = t.tensor.index_select(dim, of)
                if 0 not in t.tensor.stride() or not torch.equal(rows, t.tensor.index_select(dim, to)):
                    t.tensor.index_copy_(dim, to, rows)  # but for an expanded constant, without memory for each entry

    def passes(self, model: nn.Module, mode: Mode, seed: int = 1, grad: bool = False) -> Passes:
        """Every example once in one mode, the running statistics left as they are.

        What the wide network has chosen by order is chosen again: at near ties rounding alone would turn it.
        """
        like = next((passes for name, passes in self.before.items() if self.modes[name] == mode), None)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if mode is not False and not grad else []
        outputs, states, decisions = [], [], []
        with keep_random_state(model):
            default = torch.get_default_dtype()
            try:
                torch.set_default_dtype(self.dtype)  # constants that `forward` makes are to fit
                set_mode(model, mode)
                for number, inputs in enumerate(self.inputs):
                    set_random_state(model, seed)
                    given = inputs.copied()
                    chosen = Decisions(like.decisions[number] if like else ())
                    watched = not grad and (like is None or any(like.decisions))
                    with (
                        nullcontext() if grad else gradients(model, mode is not False),
                        _AsTried(),
                        chosen if watched else nullcontext(),
                    ):
                        outputs += [out.to_dense() for out in outputs_in(run(model, given), self.outputs)]
                    decisions.append(chosen.made)
                    states.append(random_state(model))
            finally:
                torch.set_default_dtype(default)
                with torch.no_grad():
                    for buffer, saved in buffers:
                        buffer.copy_(saved)
        return Passes(outputs if grad else [out.detach() for out in outputs], states, decisions)

    def cut(self, names: Collection[str]) -> nn.Module:
        """A copy of the twin in which the clusters of some spaces are cut; it shares the parameters that stay whole."""
        return self._cut(self.model, {name: self.clusters[name] for name in names})

    def _cut(self, model: nn.Module, clusters: Clusters) -> nn.Module:
        model = twin_of(model, lambda t: t.detach() if isinstance(t, nn.Parameter) else t.detach().clone())
        cut(model, self.spaces, clusters)
        return model

    def _unequal(self, model: nn.Module) -> Passes | None:
        """What a twin puts out in eval mode that was cut before its members were equal; None where that cannot run."""
        for path, size in self._sizes.items():
            _scale_statistics(model.get_submodule(path), size)
        with suppress(InputError):
            return self.passes(model, False)
        return None

    def changes(self, names: Collection[str]) -> tuple[dict[str, float | None], str | None]:
        """What cutting some spaces changes in each mode, and why that is not exact, or None if it is."""
        return self.changes_by(self.cut(names), self.modes)

    def changes_by(self, model: nn.Module, modes: Iterable[str]) -> tuple[dict[str, float | None], str | None]:
        """The same of a network that is cut, in some modes."""
        changes, self.raised_in = {}, None
        for mode in modes:
            before = self.before[mode]
            try:
                after = self.passes(model, self.modes[mode])
            except InputError as error:  # whatever the model raises when its sizes no longer fit
                self.raised_in = raised_in(model, error.__cause__ or error)
                return changes | {mode: math.inf}, f"its trial trim raises in {mode} mode: {_cause(error)}"
            as_random = before.states == after.states  # as much was drawn, so it was the same
            if mode != "eval" and not as_random:
                changes[mode] = None
                if [out.shape for out in before.outputs] != [out.shape for out in after.outputs]:
                    return changes | {mode: math.inf}, f"its trial trim changes the shape of the output in {mode} mode"
                continue
            changes[mode] = largest_change(*before.pairs(after))
            if self.tolerance < changes[mode] <= WORST:
                self.tolerance = max(self.tolerance, min(WORST, ROUNDING * self.rounding(mode)))
            if not changes[mode] <= self.tolerance:
                why = "its trial trim changes the output"
                if not as_random:
                    why = "the network draws random numbers in eval mode, so its trial cannot be compared"
                return changes, why
        return changes, None

    def rounding(self, mode: str) -> float:
        """What changes where the inputs are rounded otherwise: batch norm over two numbers that are close makes the
        last bits of a float64 grow 300 times, layer after layer."""
        generator, given = torch.Generator().manual_seed(self.seed), self.inputs
        self.inputs = [one.copied(partial(_rounded_otherwise, generator)) for one in given]
        try:
            after = self.passes(twin_of(self.model, Tensor.detach), self.modes[mode])
        finally:
            self.inputs = given
        return largest_change(*self.before[mode].pairs(after))

    def failures(self, names: Sequence[str], reason: str) -> Iterator[tuple[str, str]]:
        """(space, why) of those that fail, found by halves; of all that are left where they fail only together.

        Spaces that a condition ties can be cut together only, and fail together.
        """
        together = [[space.name for space in tied if space.name in names] for tied in conditions.tied(self.spaces)]
        left, found = [group for group in together if group], []
        while reason:
            found_now = [*self._search(left, reason)]
            why = "its trial trim fails together with other spaces"
            found += found_now or [(name, why) for group in left for name in group]
            failed = {name for name, _ in found}
            left = [group for group in left if failed.isdisjoint(group)]
            reason = self.changes([*chain(*left)])[1] if left else None
        yield from found

    def _search(self, groups: list[list[str]], reason: str) -> Iterator[tuple[str, str]]:
        if len(groups) == 1:
            yield from ((name, reason) for name in groups[0])
            return
        middle = len(groups) // 2
        for half in (groups[:middle], groups[middle:]):
            if why := self.changes([*chain(*half)])[1]:
                yield from self._search(half, why)

    def control(self, names: Collection[str] | None = None) -> float:
        """The change by a cut of members that are not equal, in some spaces or in all; 0 where nothing is to be seen.

        Equal members are the same network before and after, so it is enough to run either one with members that are
        not: the narrow one in eval mode, and where that shows nothing, or for some spaces, the wide one in all modes.
        """
        change, model = 0.0, None
        for name, mode in self.modes.items():
            if change > VISIBLE * self.tolerance:
                break
            if names is None and name == "eval" and self.unequal:
                after = self.unequal
            else:
                model = model or self._twin_unequal_in(names)
                after = self.passes(model, mode)
            change = max(change, largest_change(self.before[name].outputs, after.outputs))
        return change

    def _twin_unequal_in(self, names: Collection[str] | None) -> nn.Module:
        model = self.twin()
        if names is not None:
            self._make_equal(model, {k: v for k, v in self.clusters.items() if k not in names})
        return model

    def unseen(self, names: Collection[str]) -> list[str]:
        """The spaces whose channels do not reach any output, so that no cut of them could be judged.

        By the gradient of the outputs with respect to the filters of the cut network; where that is zero or cannot be
        had, by the control.
        """
        model, seen = twin_of(self.cut(names)), set()
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point() or p.is_complex())
        for mode in reversed(self.modes.values()):  # training first: of detectors the losses show most
            if any(name not in seen for name in names):
                seen |= self._seen(model, names, mode)
        return [name for name in names if name not in seen and not self.control({name}) > VISIBLE * self.tolerance]

    def _seen(self, model: nn.Module, names: Collection[str], mode: Mode) -> set[str]:
        """Spaces of which the outputs have a gradient with respect to a filter that counts."""
        model.zero_grad()
        try:
            outputs = self.passes(model, mode, grad=True).outputs
            outputs = [out[out.isfinite()] for out in outputs if out.requires_grad]
            generator = torch.Generator().manual_seed(self.seed)
            signs = [torch.randn(out.shape, generator=generator, device="cpu").sign().to(out) for out in outputs]
            torch.autograd.backward(outputs, signs)
        except Exception:  # an operation without a gradient, or one in place of what another needs
            return set()
        size = sum(float(out.detach().abs().sum()) for out in outputs)
        touched = clustered_tensors(self.model, self.spaces, {name: self.clusters[name] for name in names})
        of_owner, seen = {t.owners[0]: t for t in touched}, set()
        for space in self.spaces:
            for ref in space.producers if space.name in names else ():
                tensor = model.get_parameter(dotted(*ref.owners[0]))
                if tensor.grad is None:
                    continue
                rows = of_owner[ref.owners[0]].after_cut(ref.index.flatten()).to(tensor.device)
                weighed = (tensor.grad * tensor.detach()).abs().index_select(ref.dim, rows)
                if float(weighed.sum()) > VISIBLE * self.tolerance * size:
                    seen.add(space.name)
        return seen


def _cause(error: InputError) -> str:
    return str(error).removeprefix("the network cannot run on its example: ")


@torch.no_grad()
def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest |a − b| of any entry of any pair of tensors, relative to the median of the finite |a| ≠ 0 that differ.

    Equal infinities are equal; NaN, and tensors that do not fit, are infinitely apart.  The median keeps one large
    entry from hiding the others, and masks that most entries lie under are the same before and after.
    """
    if not before or [a.shape for a in before] != [b.shape for b in after]:
        return math.inf
    largest = 0.0
    for a, b in zip(before, after, strict=True):
        if not a.numel() or torch.equal(a, b):
            continue
        a, b = (t if t.is_complex() else t.double() for t in (a, b))
        change, size = torch.where(a == b, 0.0, (a - b).abs()).max(), a.abs()
        size = size[size.isfinite() & (size > 0) & (a != b)]
        relative = float(change / size.median()) if len(size) and not change.isnan() else math.inf
        largest = max(largest, relative)
    return largest


@torch.no_grad()
def _random(dtype: torch.dtype, generator: torch.Generator, tensor: Tensor) -> Tensor:
    """Values under which every channel matters, for a parameter: zero-initialised gammas would hide errors."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
        return _as_given(dtype, generator, tensor)
    fan_in = tensor[0].numel() if tensor.dim() > 1 else 0
    middle, away = (0.0, (4.5 / fan_in) ** 0.5) if fan_in > 1 else (0.7, 0.7)
    values = torch.empty_like(tensor, dtype=torch.float32, device="cpu")  # drawn faster than doubles are
    return values.uniform_(middle - away, middle + away, generator=generator).to(tensor.device, dtype)


@torch.no_grad()
def _noisy(dtype: torch.dtype, generator: torch.Generator, tensor: Tensor) -> Tensor:
    """A parameter's own values, each made larger at random; zeros become small positive numbers."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return _as_given(dtype, generator, tensor)
    noise = torch.rand(tensor.shape, generator=generator, dtype=dtype, device="cpu").to(tensor.device)
    own = tensor.to(dtype)
    return torch.where(own == 0, 0.1 * noise, own * (1 + 0.3 * noise))


def _as_given(dtype: torch.dtype, generator: torch.Generator, tensor: Tensor) -> Tensor:
    return tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach().clone()


def _drawn(dtype: torch.dtype, generator: torch.Generator, tensor: Tensor, signed: bool = False) -> Tensor:
    """An input of the same shape and range, drawn anew: an example may be all zeros.  Of two values it draws either;
    a mask with infinities, and whole numbers, stay.

    signed  draw from −m to m, of which m is the largest size in the example: activations that never change their sign
            would hide a function that is called for some widths alone
    """
    own = _as_given(dtype, generator, tensor)
    if own.layout is not torch.strided or not own.is_floating_point() or not own.numel() or not own.isfinite().all():
        return own
    low, high = float(own.min()), float(own.max())
    drawn = torch.rand(own.shape, generator=generator, dtype=dtype, device="cpu")
    if low < high and bool(((own == low) | (own == high)).all()):
        drawn = torch.where(drawn < 0.5, low, high)
    elif low == high == 0:
        drawn = torch.randn(own.shape, generator=generator, dtype=dtype, device="cpu")
    elif signed:
        drawn = max(abs(low), abs(high)) * (2 * drawn - 1)
    elif low == high:
        drawn = low * (0.5 + drawn)
    else:
        drawn = low + (high - low) * drawn
    return own.copy_(drawn)


def _rounded_otherwise(generator: torch.Generator, tensor: Tensor) -> Tensor:
    """Floating-point numbers, each moved by a unit in the last place, up or down."""
    if not tensor.is_floating_point():
        return tensor.clone()
    signs = torch.randint(2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
    return tensor + tensor * signs * torch.finfo(tensor.dtype).eps


_signed = partial(_drawn, signed=True)


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    buffers = dict(module._buffers.items())  # scripted modules have no dict
    named = {name: buffers.get(name) for name in ("running_mean", "running_var")}
    return {name: buffer for name, buffer in named.items() if buffer is not None and buffer.is_floating_point()}


@torch.no_grad()
def _scale_statistics(module: nn.Module, size: float) -> None:
    """Makes those of values with a mean square of 1 those of values whose mean square is `size`, in place."""
    for name, statistic in _statistics(module).items():
        statistic.mul_(size if name == "running_var" else size**0.5)


def _randomise_statistics(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        for name, statistic in _statistics(module).items():
            draw, scale, shift = (torch.randn, 0.2, 0.0) if name == "running_mean" else (torch.rand, 1.0, 0.5)
            statistic.copy_(draw(statistic.shape, generator=generator, device="cpu") * scale + shift)


def _soften(model: nn.Module) -> None:
    """Batch norm as it is, but for its ε: with few values it would make rounding grow by 1/√ε, layer after layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eps = max(module.eps, SOFT)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives a network the random weights and statistics of a trial, in place."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(_random(p.dtype if p.is_floating_point() else torch.float64, generator, p))
    _randomise_statistics(model, generator)

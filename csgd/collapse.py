"""Collapse: the pull of C-SGD apart from the gradient, for any torch optimizer (fact F11)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from csgd.carry_over import like_parameter
from csgd.centripetal import segment_mean
from csgd.clusters import ClusteredTensor, Clusters, clustered_tensors, keep_buffers
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.graph.twin import dotted
from csgd.hooks import check_hooks, on_gradients, parameters_of
from csgd.stacks import Latest, Memory, Stack, stacks_of

CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
}
COARSE = 0.05  # V is scaled when its curve has fallen by this share since: that of one step is lost in 16 bits
STATISTICS_APART = 1e-3  # ‖W − ΓW‖ / ‖W‖ of running statistics after the collapse, which every batch moves


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor with rows that become equal is: a model that is moved or cast has other tensors there.

    tensors  the parameters or the buffers of its module, by attribute;  count  of its rows
    """

    path: str
    attribute: str
    tensors: dict[str, Tensor | None]
    dim: int
    segments: Tensor
    count: int

    @classmethod
    def of(cls, model: nn.Module, t: ClusteredTensor) -> "_Place":
        path, attribute = t.owners[0]
        module, (dim, segments) = model.get_submodule(path), t.merged
        tensors = module._parameters if attribute in module._parameters else module._buffers
        return cls(path, attribute, tensors, dim, segments, len(segments))

    @property
    def name(self) -> str:
        return dotted(self.path, self.attribute)

    def merge_(self, value: Tensor, left: float = 0.0) -> None:
        """W ← ΓW + left · (W − ΓW) in place, of a value of this shape; rows that are equal stay, bit by bit."""
        merged = segment_mean(value, self.dim, self.segments)
        if not torch.equal(merged, value):
            value.copy_(merged + left * (value - merged) if left else merged)

    def relative_deviation(self, tensor: Tensor) -> float:
        return ClusteredTensor(
            [(self.path, self.attribute)], tensor, (self.dim, self.segments), None
        ).relative_deviation()


Stacked = tuple[list[Stack], list[tuple[_Place, Tensor]]]  # tensors, and those of no kind that stacks


def _found(places: Sequence[_Place]) -> list[tuple[_Place, Tensor]]:
    """The tensors that are in these places now."""
    found = []
    for place in places:
        tensor = place.tensors.get(place.attribute)
        if tensor is None or tensor.size(place.dim) != place.count:
            raise InputError(
                f"{place.name} has been cut or removed while a Collapse pulls it: trim(…, optimizer) finishes that, "
                "detach() gives it up"
            )
        found.append((place, tensor))
    return found


@dataclass
class _Part:
    """What one optimizer moves, or none does.

    left  a_t, as far as V has been scaled
    """

    places: list[_Place]
    left: float = 1.0


class Collapse:
    """Makes the members of every cluster equal, to the bit, at step `stop` of any torch optimizer (fact F11).

        csgd.Collapse(optimizer, model, spaces, clusters, stop=600)  # before the first of these steps
        train(model, optimizer)                                      # your loop stays as it is
        csgd.trim(model, spaces, clusters, optimizer)                # at step 600 or later

    Is to C-SGD what AdamW is to L2: the pull is decoupled from the gradient.  With the optimizer's own update u of
    merged gradients ΓG, which leaves V = (I − Γ)W as it is,

        W ← W − u(ΓG);   V ← (a_{t+1} / a_t) V,   so that V_t = a_t V_start

    whatever optimizer, learning rate, momentum, clipping or loss scale there are, and no strength is to be solved for.
    Where weight decay is part of the gradient V shrinks faster.  At `stop` V is 0 in every tensor of the spaces:
    parameters, trained or frozen, running statistics and other buffers.  Buffers that the state_dict leaves out, since
    the network makes them anew, are in it from now on.

    optimizers  one or several (Muon beside AdamW), which hold every trained parameter of the spaces, and only tensors
                of `model`
    stop        the number of steps of the optimizer, counted from now, after which members are equal.  Steps that a
                GradScaler leaves out are none, unless a fused kernel does it: go by `done`, not by the loop's counter
    start       the number of steps before which nothing happens
    curve       "cosine", "linear", or a_t as a function of the fraction done, from 1 at 0 to 0 at 1

    Gradients are merged in place, as clipping writes to them; V is scaled when a_t has fallen by 5 %, and at `stop`.
    The hooks hold the Collapse, so that it lasts as long as the optimizer.  Of SAM and the like, give the optimizer
    inside.  An average of the weights, whose members lag, needs `merge_equal` before the `trim` of its own copy.

    InputError for an optimizer that holds other tensors than the model's (master copies, shards), for DTensors, a
    parameter in two optimizers, and an optimizer that has a Collapse already.
    """

    def __init__(
        self,
        optimizers: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        spaces: list[ChannelSpace],
        clusters: Clusters,
        *,
        stop: int,
        start: int = 0,
        curve: str | Callable[[float], float] = "cosine",
    ):
        if not isinstance(start, Integral) or not isinstance(stop, Integral) or not 0 <= start < stop:
            raise InputError(f"a collapse needs whole numbers 0 <= start < stop, got start={start} and stop={stop}")
        if not callable(curve) and curve not in CURVES:
            raise InputError(f"curve must be cosine, linear or a function of the fraction done, got {curve!r}")
        if isinstance(optimizers, nn.Module):
            raise InputError("a collapse takes the optimizers first, then the model")
        self.optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self.start, self.stop, self.curve = start, stop, curve if callable(curve) else CURVES[curve]
        self.steps = [0] * len(self.optimizers)
        _check_optimizers(self.optimizers, model)
        self._places = _places(model, spaces, clusters)
        self._parts = [_Part([]) for _ in (*self.optimizers, None)]  # the last one: what no optimizer moves
        self._held: list[int] = []
        self._divide()
        self._stacks: Latest[Stacked] = Latest()
        self._memory: Memory = {}
        self._handles = []
        for number, optimizer in enumerate(self.optimizers):
            after = torch.compiler.disable(partial(self._after, number))
            after.collapse = self  # by which `attached` finds it
            self._handles += [
                optimizer.register_step_pre_hook(torch.compiler.disable(partial(self._before, number))),
                on_gradients(optimizer, partial(self._merge_gradients, number)),
                optimizer.register_step_post_hook(after),
            ]

    def left(self, step: int) -> float:
        """a_t after `step` steps: what is left of every deviation V."""
        done = (step - self.start) / (self.stop - self.start)
        if done <= 0:
            return 1.0
        left = 0.0 if done >= 1 else float(self.curve(done))
        if not 0 <= left <= 1:
            raise InputError(f"the curve of a collapse must fall from 1 to 0, it is {left:g} at {done:g}")
        return left

    @property
    def done(self) -> bool:
        """Whether every optimizer has taken `stop` steps."""
        return min(self.steps) >= self.stop

    def strength(self, lr: float) -> float:
        """ε_t = (1 − a_{t+1} / a_t) / τ_t: the centripetal strength with which the published method would take the next
        step at the learning rate τ_t = lr; infinite where that is 0."""
        now, then = (self.left(min(self.steps) + more) for more in (0, 1))
        share = 1 - then / now if now else 0.0
        return share / lr if lr else math.inf if share else 0.0

    @torch.no_grad()
    def deviation(self) -> Tensor:
        """Σ‖W − ΓW‖² over the parameters whose rows become equal, a scalar tensor that stays on the device."""
        stacks, others = self._stacked([place for place, p in _found(self._places) if isinstance(p, nn.Parameter)])
        terms = [stack.deviation(stack.tensors) for stack in stacks]
        for place, p in others:
            terms.append((p - segment_mean(p, place.dim, place.segments)).abs().square().sum())
        return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """What a run that is killed goes on from, to the same bits, beside those of the model and the optimizers."""
        return {"steps": list(self.steps), "left": [part.left for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        steps, left = state_dict["steps"], state_dict["left"]
        if len(steps) != len(self.steps):
            raise InputError(f"a state_dict of a collapse with {len(steps)} optimizers, this has {len(self.steps)}")
        self.steps = list(steps)
        for part, one in zip(self._parts, left, strict=True):
            part.left = one

    def check(self) -> None:
        """InputError before `stop`, and where members have come apart since by more than rounding: something else
        writes to them (Lookahead, a swap of averaged weights), and to merge them once more would change outputs."""
        if not self.done:
            raise InputError(
                f"the filters collapse at step {self.stop}, and the optimizer has taken {min(self.steps)} steps: "
                "train on until Collapse.done"
            )
        for place, tensor in _found(self._places):
            apart = place.relative_deviation(tensor)
            exact = isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex())
            if apart > (math.sqrt(torch.finfo(tensor.dtype).eps) / 10 if exact else STATISTICS_APART):
                raise InputError(
                    f"{place.name} came apart after its collapse (relative deviation {apart:.1e}): something else "
                    "than the optimizer writes to it, and the cut would change outputs"
                )

    @torch.no_grad()
    def finish(self) -> None:
        """Makes members equal to the bit once more, in the state of the optimizers too, and lets go of everything.

        Steps after `stop` may have left members apart by rounding, as torch's fused kernels do.  `trim` calls it.
        InputError as `check` raises it, before anything changes.
        """
        self.check()
        for number, part in enumerate(self._parts):
            self._merge(number, part)
        self.detach()

    def detach(self) -> None:
        """Takes the hooks off the optimizers, and leaves the members as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._places, self.optimizers = [], [], []
        self._stacks.clear()
        self._memory.clear()
        for part in self._parts:
            part.places = []

    @torch.no_grad()
    def _before(self, number: int, *_) -> None:
        if self._held != [_count(optimizer) for optimizer in self.optimizers]:
            self._divide()  # parameters that were frozen have come to an optimizer
        if self.steps[number] == self.start:
            self._merge_state(number)

    @torch.no_grad()
    def _merge_gradients(self, number: int) -> None:
        """G ← ΓG in place."""
        if self.steps[number] < self.start:
            return
        stacks, others = self._stacked(self._parts[number].places, of_gradients=True)
        for stack in stacks:
            stack.merge_([p.grad for p in stack.tensors])
        for place, p in others:
            if p.grad.layout is not torch.strided:
                raise InputError(f"{place.name} has sparse gradients, which cannot be merged: keep its layer whole")
            place.merge_(p.grad)

    @torch.no_grad()
    def _after(self, number: int, *_) -> None:
        self.steps[number] += 1
        self._pull(number, self.steps[number])
        self._pull(-1, min(self.steps))

    def _pull(self, number: int, step: int) -> None:
        """Scales V of a part to what is left of it after `step` steps, where that has fallen far enough."""
        part, left = self._parts[number], self.left(step)
        if step == self.stop or (step > self.stop and part.left > 0):
            self._merge(number, part)
        elif self.start < step < self.stop and left <= (1 - COARSE) * part.left:
            ratio = left / part.left if part.left else 0.0
            stacks, others = self._stacked(part.places)
            for stack in stacks:
                stack.merge_(stack.tensors, ratio)
            for place, tensor in others:
                if tensor.is_complex():  # whole numbers have no mean: they become equal at the end alone
                    place.merge_(tensor, ratio)
        else:
            return
        part.left = left

    def _merge(self, number: int, part: _Part) -> None:
        """V = 0 in the tensors of a part and in what its optimizer remembers of them.

        A weight decay that is part of the gradient has left V in the momentum, and would bring it back.
        """
        for place, tensor in _found(part.places):
            place.merge_(tensor)
        if 0 <= number < len(self.optimizers):
            self._merge_state(number)

    def _merge_state(self, number: int) -> None:
        """Averages the rows of the optimizer's state: what differs between those of members would move V."""
        optimizer = self.optimizers[number]
        if isinstance(optimizer, torch.optim.LBFGS):
            if self.steps[number] == self.start:  # one history of all parameters, of steps that were not merged
                optimizer.state.clear()
            return
        for place, p in _found(self._parts[number].places):
            for value in optimizer.state.get(p, {}).values():
                if like_parameter(value, p) and value.size(place.dim) > 1:
                    place.merge_(value)

    def _stacked(self, places: Sequence[_Place], of_gradients: bool = False) -> Stacked:
        """Of the tensors that are in some places now; `of_gradients`: of those that have one."""
        tensors = [place.tensors.get(place.attribute) for place in places]
        if type(None) in map(type, tensors):
            _found(places)  # raises
        key = _marks(tensors) + (tuple([tensor.grad is None for tensor in tensors]) if of_gradients else ())
        return self._stacks.of(key, partial(_stack, places, of_gradients, self._memory))

    def _divide(self) -> None:
        """Which optimizer moves what: InputError if none moves a trained parameter."""
        self._held = [_count(optimizer) for optimizer in self.optimizers]
        home = {id(p): number for number, optimizer in enumerate(self.optimizers) for p in parameters_of(optimizer)}
        for part in self._parts:
            part.places = []
        for place, tensor in _found(self._places):
            if tensor.requires_grad and id(tensor) not in home:
                raise InputError(
                    f"{place.name} is in no optimizer that was given: give all that train the model, or freeze it "
                    "(requires_grad_(False)); master copies and shards of the weights cannot be pulled"
                )
            self._parts[home.get(id(tensor), -1)].places.append(place)


def attached(optimizer: Optimizer) -> Collapse | None:
    """The Collapse that hooks of this optimizer belong to."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return next((hook.collapse for hook in hooks if hasattr(hook, "collapse")), None)


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _check_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    seen, names = set(), {id(p): name for name, p in model.named_parameters()}
    if not optimizers:
        raise InputError("a collapse needs an optimizer")
    for optimizer in optimizers:
        check_hooks(optimizer)
        kind = type(optimizer).__name__
        if isinstance(optimizer, _sharding()):
            raise InputError(f"{kind} keeps each rank's share of the state alone: give an ordinary optimizer")
        if attached(optimizer):
            raise InputError(f"this {kind} has a Collapse already: finish() or detach() that first")
        for p in parameters_of(optimizer):
            if id(p) not in names:
                raise InputError(
                    f"this {kind} holds a tensor of shape {list(p.shape)} that is no parameter of the model: master "
                    "copies and shards of the weights cannot be pulled, other tensors need an optimizer of their own"
                )
            if id(p) in seen:
                raise InputError(f"{names[id(p)]} is in two of the optimizers, it must be in one")
        seen |= {id(p) for p in parameters_of(optimizer)}


def _sharding() -> tuple[type, ...]:
    """Torch's classes of sharded tensors and states, where there are ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return ()
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor

    return DTensor, ZeroRedundancyOptimizer


def _places(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> list[_Place]:
    """Of every tensor whose rows become equal, but for constants that are."""
    places, sharding, touched = [], _sharding(), clustered_tensors(model, spaces, clusters)
    keep_buffers(model, touched)
    for t in touched:
        if isinstance(t.tensor, sharding):
            raise InputError(f"{t.name} is a DTensor: the rows of a sharded tensor cannot be pulled together")
        if not t.becomes_equal:
            continue
        expanded = any(size > 1 and stride == 0 for size, stride in zip(t.tensor.shape, t.tensor.stride(), strict=True))
        if expanded and t.relative_deviation() == 0:
            continue
        if expanded:  # gets memory for each of its entries
            t.tensor.data = t.tensor.detach().clone(memory_format=torch.contiguous_format)
        places.append(_Place.of(model, t))
    return places


def _marks(tensors: Sequence[Tensor]) -> tuple:
    """What changes where a tensor is replaced, cut, cast or moved; every step asks, so one kind of call at a time."""
    sizes, dtypes = [tensor.numel() for tensor in tensors], [tensor.dtype for tensor in tensors]
    return (*map(id, tensors), *sizes, *dtypes, *[tensor.get_device() for tensor in tensors])


def _stack(places: Sequence[_Place], of_gradients: bool, memory: Memory) -> Stacked:
    stacking, others = [], []
    for place, tensor in _found(places):
        if of_gradients and tensor.grad is None:
            continue
        if tensor.is_floating_point() and (tensor.grad is None or tensor.grad.layout is torch.strided):
            stacking.append((tensor, place.dim, place.segments))
        else:
            others.append((place, tensor))
    return stacks_of(stacking, memory), others

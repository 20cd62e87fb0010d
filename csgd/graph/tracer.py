"""Carries labels along a real forward pass, at the level of torch.*, F.* and tensor methods."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from csgd.errors import InputError
from csgd.graph.attention import ATTENTION
from csgd.graph.conditions import add_conditions
from csgd.graph.kernels import layer_of
from csgd.graph.labels import compact
from csgd.graph.ledger import Ledger
from csgd.graph.recurrent import RECURRENT
from csgd.graph.rules import RULES, Call, apply_rule, unknown
from csgd.graph.sizes import hold, measured
from csgd.graph.spaces import ChannelSpace, spaces_of
from csgd.graph.twin import (
    Inputs,
    Outputs,
    check_examples,
    check_has_values,
    dotted,
    gradients,
    keep_random_state,
    modes_of,
    outputs_in,
    own_tensors,
    random_state,
    run,
    set_anew,
    set_mode,
    set_random_state,
    shrink_images,
    twin_of,
)

RULES.update(ATTENTION)
RULES.update(RECURRENT)

SIZES = {torch.Tensor.size, torch.Tensor.numel, torch.Tensor.nelement, torch.numel}
TRAINING_PASSES = 8  # at most, until what is left out at random has all been seen


class _Functions(TorchFunctionMode):
    """Applies the rule of each function to the labels of its operands.

    originals  {id: name} of tensors that a copy of their network must not reach
    """

    def __init__(self, ledger: Ledger, originals: dict[int, str]):
        super().__init__()
        self.ledger, self.originals = ledger, originals
        self.inside = False  # within a call that a rule accounts for

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, self.inside = kwargs or {}, True
        try:
            if self.originals:
                self._refuse_originals(args, kwargs)
            out = func(*args, **kwargs)
            with torch._C._DisableTorchDispatch():  # labels need no watching, and are many
                if isinstance(out, torch.Size) or func in SIZES:
                    return self._measured(args, kwargs, out)
                apply_rule(self.ledger, func, args, kwargs, out)
        finally:
            self.inside = False
        return out

    def _measured(self, args: tuple, kwargs: dict, out: torch.Size | int) -> torch.Size | int:
        """A shape, one size of it or the product of all, that knows of which channels it is the number."""
        tensor, *rest = (*args, *kwargs.values())
        shape = measured(self.ledger, tensor, out if isinstance(out, torch.Size) else torch.Size(tensor.shape))
        return shape if isinstance(out, torch.Size) else shape[rest[0]] if rest else math.prod(shape)

    def _refuse_originals(self, args: tuple, kwargs: dict) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and id(value) in self.originals:
                raise InputError(
                    f"{self.originals[id(value)]} of the network is used while a copy of it runs: code outside of its "
                    "modules holds it, so nothing can be tried without changing the network"
                )


class _Escapes(TorchDispatchMode):
    """Catches kernels that run outside every intercepted function (scripted functions, C++): they pin."""

    def __init__(self, functions: _Functions):
        super().__init__()
        self.functions = functions

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.functions.inside:
            self.functions.inside = True
            call = Call.of(func, args, kwargs, out)
            self.functions.ledger.seen.update(map(id, call.inputs))
            if call.name in RULES and "::" in call.name:
                apply_rule(self.functions.ledger, func, args, kwargs, out)
            elif call.inputs and call.outputs:
                unknown(self.functions.ledger, call, "runs in compiled code")
            self.functions.inside = False
        return out


def trace_spaces(
    model: nn.Module,
    example: Any,
    *,
    examples: Sequence[Any] = (),
    unused: Sequence[str] = (),
    outputs: Outputs = None,
    itself: bool = True,
) -> list[ChannelSpace]:
    """Channel spaces of `model` by label tracing alone, without the trial trim; see `find_spaces`.

    Eval and train mode are both run, since auxiliary heads exist in train mode only, and so is the mode that the model
    is in where some of its modules alone train; on a copy of the model and of its inputs, so that whatever a forward
    pass changes they stay as they are.

    itself  trace a model that cannot be copied itself, its hooks and all; else InputError
    """
    if isinstance(unused, str):
        raise InputError(f"unused must be a list of patterns, got the text {unused!r}")
    if isinstance(outputs, str):
        raise InputError(f"outputs must be a list of names or numbers, or a function, got the text {outputs!r}")
    if isinstance(examples, Tensor):
        raise InputError("examples must be a list of examples, got one tensor")
    inputs = [Inputs.of(one) for one in (example, *examples)]
    check_has_values(model)
    check_examples(inputs)
    with keep_random_state(model):
        try:
            twin = twin_of(model)
        except InputError:
            if not itself:
                raise
            modes = [(module, module.training) for module in model.modules()]
            buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            try:
                return _trace(model, inputs, unused, {}, outputs)
            finally:
                for module, training in modes:
                    module.training = training
                with torch.no_grad():
                    for buffer, saved in buffers:
                        buffer.copy_(saved)
        originals = {id(tensor): dotted(path, name) for path, _, name, tensor in own_tensors(model)}
        if shrink_images(twin):
            hold(twin)
            with suppress(InputError):  # its code may take images of its own size alone
                return _trace(twin, inputs, unused, originals, outputs)
            twin = twin_of(model)
        hold(twin)
        return _trace(twin, inputs, unused, originals, outputs)


def _trace(
    model: nn.Module,
    examples: list[Inputs],
    unused: Sequence[str],
    originals: dict[int, str],
    outputs: Outputs,
    maps: Mapping[int, int] = MappingProxyType({}),
) -> list[ChannelSpace]:
    """Spaces by one forward pass in each mode, and again where these have shown along which dims maps follow (`maps`:
    {id of a tensor: dim})."""
    ledger, modes = Ledger(model, maps), modes_of(model)
    for mode in [mode for name, mode in modes.items() if name != "train"]:
        set_mode(model, mode)
        for inputs in examples:
            _run(ledger, model, inputs, 0, originals, mode is not False, outputs)
    if ledger.met:
        return _trace(model, examples, unused, originals, outputs, {**ledger.met, **maps})
    statistics = {id(buffer): buffer.clone() for buffer in model.buffers()}
    used, evaluated, ledger.seen = ledger.seen & statistics.keys(), ledger.seen, set()
    for seed in range(TRAINING_PASSES):
        drew = [_run(ledger, model.train(), inputs, seed, originals, True, outputs) for inputs in examples]
        left = _unreached(ledger, model, evaluated | ledger.seen)
        if used <= ledger.seen and not (left and any(drew)):
            break
    if ledger.met:
        return _trace(model, examples, unused, originals, outputs, {**ledger.met, **maps})
    _move_statistics(model, examples, [(b, statistics[id(b)]) for b in model.buffers() if id(b) in statistics])
    made_anew = set_anew(model)
    for _, _, name, buffer in own_tensors(model):
        if id(buffer) in statistics and torch.equal(buffer, statistics[id(buffer)]):
            ledger.constants.add(id(buffer))
            if name in made_anew:
                ledger.freeze(buffer, "meets a buffer that the network's code may make anew")
    _pin_what_may_be_read(ledger, _without(left, unused), examples)
    spaces = spaces_of(ledger, model)
    add_conditions(ledger, spaces)
    return spaces


def _move_statistics(model: nn.Module, examples: list[Inputs], buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Runs the examples with noise where a buffer is what it was: means of an example of zeros are what they were."""
    if any(buffer.is_floating_point() and torch.equal(buffer, before) for buffer, before in buffers):
        for inputs in examples:
            with torch.no_grad(), suppress(InputError):  # noise may be what the network does not take
                run(model, inputs.copied(lambda t: t + torch.randn_like(t) if t.is_floating_point() else t.clone()))


def _run(
    ledger: Ledger,
    model: nn.Module,
    inputs: Inputs,
    seed: int,
    originals: dict[int, str],
    training: bool,
    outputs: Outputs,
) -> bool:
    """One forward pass of which the ledger takes note, the same one whatever was drawn before; whether it draws."""
    set_random_state(model, seed)
    ledger.training = training
    before, inputs = random_state(model), inputs.copied()
    for tensor in inputs.tensors():
        ledger.label(tensor, ledger.fresh(1, "network input"))
    functions = _Functions(ledger, originals)
    with gradients(model, training), _Escapes(functions), functions:
        out = run(model, inputs)
    for tensor in outputs_in(out, outputs):
        if tensor.numel() > 1:
            ledger.pin(ledger.labels(tensor), "network output")
    return random_state(model) != before


@dataclass
class _Unreached:
    """A layer that no pass has called: numbers of channels that it may read and put out, and whether it may read them
    from a flattened block."""

    reads: set[int] = field(default_factory=set)
    makes: set[int] = field(default_factory=set)
    flattened: bool = False


def _unreached(ledger: Ledger, model: nn.Module, seen: set[int]) -> dict[str, _Unreached]:
    left: dict[str, _Unreached] = defaultdict(_Unreached)
    for path, _, _, tensor in own_tensors(model):
        if id(tensor) in seen or not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        path = layer_of(path)
        layer, module = left[path], model.get_submodule(path)
        if isinstance(module, nn.modules.conv._ConvNd):
            layer.reads.add(module.in_channels)
            layer.makes.add(module.out_channels)
        elif isinstance(module, nn.Linear):
            layer.reads.add(module.in_features)
            layer.makes.add(module.out_features)
            layer.flattened = True
        elif isinstance(module, nn.Embedding):
            layer.makes.add(module.embedding_dim)
        else:  # of a norm, a scale, a layer of one's own: any dim may lie along the channels
            layer.makes.update(size for size in tensor.shape if size > 1)
    return left


def _without(left: dict[str, _Unreached], unused: Sequence[str]) -> dict[str, _Unreached]:
    """Unreached layers, but for those that the user says are never called."""
    for pattern in unused:
        if not any(fnmatchcase(path, pattern) for path in left):
            raise InputError(f"unused: no layer that the example leaves out matches '{pattern}'")
    return {path: layer for path, layer in left.items() if not any(fnmatchcase(path, one) for one in unused)}


def _pin_what_may_be_read(ledger: Ledger, left: dict[str, _Unreached], examples: list[Inputs]) -> None:
    """Pins the channels that a layer which no pass has called may read, or meet in a sum: all of a fitting number, also
    together with those of another activation.

    Where nothing fits, what it reads is put together in code that was not seen, and may hold any channels.
    """
    known = {size for layer in left.values() for size in layer.makes}
    known.update(size for inputs in examples for tensor in inputs.tensors() for size in tensor.shape)
    activations = [compact(labels) for labels in ledger.activations] if left else []
    channels = {n for labels in activations for n in labels.shape if n > 1} | {size for size in known if size > 1}
    for path, layer in left.items():
        reason = f"{path}, which the example does not reach, may read it: examples=[…] or unused=['{path}'] free it"
        for size in layer.reads | layer.makes:
            flattened = layer.flattened and size in layer.reads
            beside = {size - n for n in channels} & channels if size in layer.reads else set()  # two that are joined
            fits = [
                labels for labels in activations if any(_fits(size, n, flattened) or n in beside for n in labels.shape)
            ]
            if not fits and size in layer.reads and not any(_fits(size, n, flattened) for n in known):
                fits = [torch.arange(len(ledger.channel), device="cpu")]
            for labels in fits:
                ledger.pin(labels, reason)


def _fits(size: int, channels: int, flattened: bool) -> bool:
    """Whether so many channels are `size` values, or may be when a block of positions is flattened."""
    return channels > 1 and (size == channels or (flattened and size % channels == 0))

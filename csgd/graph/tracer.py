"""Carries labels along a real forward pass, at the level of torch.*, F.* and tensor methods."""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from csgd.errors import InputError
from csgd.graph.ledger import Ledger
from csgd.graph.rules import Call, apply_rule, unknown
from csgd.graph.spaces import ChannelSpace, spaces_of

TRAINING_PASSES = 8  # at most, until blocks that are left out at random have all been seen


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors of a nested value: containers of any class, dataclasses and plain objects."""
    return _tensors_in(value, set())


def _tensors_in(value, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, type | nn.Module | str | bytes):
        return
    seen.add(id(value))
    parts = []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts += value
    parts += getattr(value, "__dict__", {}).values()
    parts += [getattr(value, slot) for slot in getattr(type(value), "__slots__", ()) if hasattr(value, slot)]
    for part in parts:
        yield from _tensors_in(part, seen)


class _Functions(TorchFunctionMode):
    """Applies the rule of each function to the labels of its operands."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger
        self.inside = False  # within a call that a rule accounts for

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, self.inside = kwargs or {}, True
        try:
            out = func(*args, **kwargs)
            apply_rule(self.ledger, func, args, kwargs, out)
        finally:
            self.inside = False
        return out


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
            if call.inputs and call.outputs:
                unknown(self.functions.ledger, call, "runs in compiled code")
            self.functions.inside = False
        return out


def trace_spaces(model: nn.Module, example) -> list[ChannelSpace]:
    """Channel spaces of `model` by label tracing alone, without the trial trim.

    `example` is an input tensor (batch of 2 or more) or a tuple of inputs.  Eval and train mode are both run,
    since auxiliary heads exist in train mode only, on a copy of the model, so that whatever a forward pass changes
    the model stays as it is.  InputError if the model returns no tensor that can be found.
    """
    with keep_random_state(model):
        try:
            model = twin_of(model)
        except Exception:  # a model that cannot be copied is traced itself
            modes = [(module, module.training) for module in model.modules()]
            buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            try:
                return _trace(model, example)
            finally:
                for module, training in modes:
                    module.training = training
                with torch.no_grad():
                    for buffer, saved in buffers:
                        buffer.copy_(saved)
        return _trace(model, example)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy that this process can run alone: its batch norm does not wait for the images of other ranks."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.forward = MethodType(nn.modules.batchnorm._BatchNorm.forward, module)
    return twin


def _trace(model: nn.Module, example) -> list[ChannelSpace]:
    ledger = Ledger(model)
    _run(ledger, model.eval(), example, seed=0)
    statistics = {id(buffer): buffer.clone() for buffer in model.buffers()}
    used, ledger.seen = ledger.seen & statistics.keys(), set()
    for seed in range(TRAINING_PASSES):
        _run(ledger, model.train(), example, seed)
        if used <= ledger.seen:
            break
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if id(buffer) in statistics and torch.equal(buffer, statistics[id(buffer)]):
                ledger.freeze(buffer, "scaled by a buffer that training does not change")
            elif buffer is not None and name in module._non_persistent_buffers_set:
                ledger.freeze(buffer, "meets a buffer that is not saved with the network")
    return spaces_of(ledger, model)


def _run(ledger: Ledger, model: nn.Module, example, seed: int) -> None:
    """One forward pass of which the ledger takes note, the same one whatever was drawn before."""
    set_random_state(model, seed)
    inputs = tree_map_only(Tensor, Tensor.clone, example if isinstance(example, tuple) else (example,))
    for tensor in tensors_in(inputs):
        ledger.label(tensor, ledger.fresh(1, "network input"))
    functions = _Functions(ledger)
    with torch.no_grad(), _Escapes(functions), functions:
        out = model(*inputs)
    outputs = list(tensors_in(out))
    if not outputs:
        raise InputError(f"the model returns no tensor that can be found, but {type(out).__name__}")
    for tensor in outputs:
        if tensor.numel() > 1:
            ledger.pin(ledger.labels(tensor), "network output")


def set_random_state(model: nn.Module, seed: int) -> None:
    """Seeds what `keep_random_state` restores: torch.manual_seed would also seed the devices of others."""
    on_cuda = _cuda_devices(model) if torch.cuda.is_initialized() else []
    for generator in (torch.default_generator, *(torch.cuda.default_generators[device] for device in on_cuda)):
        generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def keep_random_state(model: nn.Module):
    """Random states of torch, numpy and Python as they were, whatever a forward pass draws."""
    devices = _cuda_devices(model)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

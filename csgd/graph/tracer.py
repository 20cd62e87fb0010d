"""Carries labels along a real forward pass, at the level of torch.*, F.* and tensor methods."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csgd.graph.ledger import Ledger
from csgd.graph.rules import Call, apply_rule, unknown
from csgd.graph.spaces import ChannelSpace, spaces_of


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors of a nested value: containers, dataclasses and plain objects."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module) and not callable(leaf):
            yield from tensors_in(vars(leaf))


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
            unknown(self.functions.ledger, Call.of(func, args, kwargs, out), "runs in compiled code")
            self.functions.inside = False
        return out


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def trace_spaces(model: nn.Module, example) -> list[ChannelSpace]:
    """Channel spaces of `model` by label tracing alone, without the trial trim.

    `example` is an input tensor (batch of 2 or more) or a tuple of inputs.  Eval and train mode are both run,
    since auxiliary heads exist in train mode only; mode, buffers and the random state are restored.
    """
    args = example if isinstance(example, tuple) else (example,)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    ledger = Ledger(model)
    try:
        for training in (False, True):
            model.train(training)
            inputs = [a.clone() if isinstance(a, Tensor) else a for a in args]
            for tensor in tensors_in(inputs):
                ledger.label(tensor, ledger.fresh(1, "network input"))
            functions = _Functions(ledger)
            with torch.no_grad(), torch.random.fork_rng(_cuda_devices(model)), _Escapes(functions), functions:
                out = model(*inputs)
            for tensor in tensors_in(out):
                if tensor.numel() > 1:
                    ledger.pin(ledger.labels(tensor), "network output")
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
    return spaces_of(ledger, model)

"""A network to experiment on: a copy that shares nothing with the original, the inputs it is called with, and random
states that are put back."""

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dis import get_instructions
from functools import partial
from inspect import unwrap
from threading import RLock
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from csgd.errors import InputError

SMALL = 256  # pixels
SETTERS = {"register_buffer", "setattr", "_buffers"}  # by which code sets a buffer whose name is a text


class Inputs:
    """What a forward pass is called with: `Inputs(x, task="a")` stands for `model(x, task="a")`."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, example: Any) -> "Inputs":
        """An example as users write it: inputs of all kinds, a plain tuple of inputs, or a single input."""
        return example if isinstance(example, cls) else cls(*(example if type(example) is tuple else (example,)))

    def copied(self, new: Callable[[Tensor], Tensor] = Tensor.clone) -> "Inputs":
        """A deep copy with each tensor t, wherever it lies, replaced by new(t).

        InputError if something in it cannot be copied.
        """
        memo = {id(tensor): new(tensor.detach()) for tensor in self.tensors()}
        try:
            return copy.deepcopy(self, memo)
        except Exception as error:  # whatever a class of the user's raises
            raise InputError(f"the example cannot be copied: {type(error).__name__}: {_first_line(error)}") from None

    def tensors(self) -> Iterator[Tensor]:
        return tensors_in((self.args, self.kwargs))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested value: containers of any class, dataclasses and plain objects."""
    return _tensors_in(value, set())


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, type | nn.Module | str | bytes):
        return
    seen.add(id(value))
    parts = []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        parts += value
    parts += getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        slots = [slots] if isinstance(slots, str) else slots
        parts += [getattr(value, slot) for slot in slots if hasattr(value, slot)]
    for part in parts:
        yield from _tensors_in(part, seen)


Outputs = Callable[[Any], Any] | Sequence[str | int] | None  # what of the value of a network counts: all, by default


def outputs_in(out: Any, outputs: Outputs = None) -> list[Tensor]:
    """The tensors of what a network returns that count.

    InputError if there are none, or if one that is named is not there.
    """
    if outputs is None:
        counts = out
    elif callable(outputs):
        counts = outputs(out)
    else:
        counts = [_entry(out, key) for key in outputs]
    tensors = list(tensors_in(counts))
    if not tensors:
        raise InputError(f"the model returns no tensor that can be found, but {type(counts).__name__}")
    return tensors


def _entry(out: Any, key: str | int) -> Any:
    try:
        return getattr(out, key) if isinstance(key, str) and not isinstance(out, Mapping) else out[key]
    except (AttributeError, IndexError, KeyError, TypeError):
        many = f" of {len(out)}" if isinstance(out, list | tuple) else ""
        allowed = ", ".join(map(repr, out)) if isinstance(out, Mapping) else f"a {type(out).__name__}{many}"
        raise InputError(f"outputs: the network does not return {key!r}, but {allowed}") from None


def own_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(module path, module, attribute, tensor) of every parameter and buffer, once for each owner."""
    for path, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield path, module, attribute, tensor


def dotted(path: str, attribute: str) -> str:
    """The name of a tensor in a state_dict."""
    return f"{path}.{attribute}" if path else attribute


def check_has_values(model: nn.Module) -> None:
    """InputError if a parameter or buffer has no values yet."""
    for path, _, attribute, tensor in own_tensors(model):
        name = dotted(path, attribute)
        if is_lazy(tensor):
            raise InputError(f"{name} is lazy and has no shape yet: call the network once, then find its spaces")
        if tensor.is_meta:
            raise InputError(f"{name} is on the meta device and has no values: load the weights, then find its spaces")


def check_examples(examples: Iterable[Inputs]) -> None:
    """InputError if a tensor of an example has no values, or if none of them has an entry."""
    for inputs in examples:
        tensors = list(inputs.tensors())
        if any(tensor.is_meta for tensor in tensors):
            raise InputError("the example has a tensor on the meta device, which has no values")
        if any(tensor.is_nested for tensor in tensors):
            raise InputError("the example has a nested tensor, which no label can follow: pad it")
        if tensors and not any(tensor.numel() for tensor in tensors):
            raise InputError(f"the example of {list(tensors[0].shape)} is empty: it needs a batch of 2 or more")


def twin_of(model: nn.Module, new: Callable[[Tensor], Tensor] = Tensor.clone) -> nn.Module:
    """A copy that this process can run alone, with new(t) in the place of each parameter and buffer t.

    Functions that hang on a module (hooks, a replaced `forward`, a lambda that calls another layer) are copied too,
    with all that their closures and globals hold, so that a twin that runs neither reads nor writes the original.
    Backward hooks are left out: they are for the gradients of training.
    Batch norm does not wait for the images of other ranks.
    InputError if something in it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tensors_in({key: value for key, value in vars(module).items() if key[:1] != "_"}):
            memo[id(tensor)] = tensor.detach().clone()  # else a tensor with a history cannot be copied
    for _, _, _, tensor in own_tensors(model):
        memo[id(tensor)] = _like(tensor, new)
    try:
        with keep_random_state(model):  # of which a class of the user's may draw when it is copied, the same each time
            set_random_state(model, 0)
            twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module raises that cannot be copied
        raise InputError(
            f"the network cannot be copied for its trial ({type(error).__name__}: {_first_line(error)}); "
            "trial=False leaves it out"
        ) from None
    memo.update({id(part): part for part in (*twin.modules(), *twin.parameters(), *twin.buffers())})  # copied once
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(module)[name] = _rebound(value, memo)
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if isinstance(module, nn.SyncBatchNorm):
            module.forward = MethodType(nn.modules.batchnorm._BatchNorm.forward, module)
    return twin


def shrink_images(twin: nn.Module) -> bool:
    """Lets detectors of torchvision, which resize images themselves, make them SMALL pixels high, not 800: as many
    channels, a tenth of the work.  Whether there is one."""
    if (known := sys.modules.get("torchvision.models.detection.transform")) is None:
        return False
    found = False
    for module in twin.modules():
        resizes = isinstance(module, known.GeneralizedRCNNTransform) and module.fixed_size is None
        if resizes and isinstance(module.min_size, tuple | list):  # not what a user set wrongly
            module.min_size = tuple(min(size, SMALL) for size in module.min_size)
            found = True
    return found


def set_anew(model: nn.Module) -> set[str]:
    """Names of attributes that the code of a network, but for its constructors, sets: a table of positions that grows.

    The code of all its modules: a network may grow the table of a layer.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    held = [value for kind in kinds for value in vars(kind).values()]
    functions = [unwrap(part) for value in held for part in _functions(value)]
    codes = [f.__code__ for f in functions if isinstance(f, FunctionType) and f.__name__ != "__init__"]
    return set().union(*map(_set_in, codes))


def _functions(value: Any) -> list[Any]:
    """The functions that an attribute of a class calls."""
    return [f for f in (value.fget, value.fset) if f] if isinstance(value, property) else [value] * callable(value)


def _set_in(code: CodeType) -> set[str]:
    """The names of attributes that code, or a function in it, sets, in one of the ways there are."""
    stored = {step.argval for step in get_instructions(code) if step.opname == "STORE_ATTR"}
    by_name = set() if SETTERS.isdisjoint(code.co_names) else {text for text in code.co_consts if isinstance(text, str)}
    inside = [_set_in(part) for part in code.co_consts if isinstance(part, CodeType)]
    return stored.union(by_name, *inside)


def _like(tensor: Tensor, new: Callable[[Tensor], Tensor]) -> Tensor:
    """new(tensor), as a parameter where the tensor is one, with the attributes that hang on it."""
    with torch.no_grad():
        values = new(tensor)
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, tensor.requires_grad)
    vars(values).update(vars(tensor))
    return values


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """`value`, which was deep-copied with `memo`, with the functions in it copied too: deepcopy leaves them alone."""
    if isinstance(value, FunctionType):
        return _copied_function(value, memo)
    if isinstance(value, partial):
        arguments = {key: _rebound(part, memo) for key, part in value.keywords.items()}
        return partial(_rebound(value.func, memo), *(_rebound(part, memo) for part in value.args), **arguments)
    if isinstance(value, MutableMapping | MutableSequence) and type(value).__module__ in ("builtins", "collections"):
        for key in list(value) if isinstance(value, MutableMapping) else range(len(value)):
            if isinstance(value[key], FunctionType | partial | MutableMapping | MutableSequence):
                value[key] = _rebound(value[key], memo)
    return value


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A function that works on copies of whatever its closure and its globals hold."""
    if id(function) in memo:
        return memo[id(function)]
    read = {name for name in _names(function.__code__) if _is_mutable(function.__globals__.get(name))}
    if not read and not function.__closure__ and not function.__defaults__ and not function.__kwdefaults__:
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    globals_ = dict(function.__globals__) if read else function.__globals__
    copied = FunctionType(function.__code__, globals_, function.__name__, None, cells)
    memo[id(function)] = copied  # first, for functions that call themselves
    for new, old in zip(cells, function.__closure__ or (), strict=True):
        try:
            new.cell_contents = _copied(old.cell_contents, memo)
        except ValueError:  # not assigned yet
            continue
    for name in read:
        globals_[name] = _copied(globals_[name], memo)
    copied.__defaults__, copied.__kwdefaults__ = _copied((function.__defaults__, function.__kwdefaults__), memo)
    copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
    vars(copied).update(vars(function))
    return copied


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return _rebound(copy.deepcopy(value, memo), memo)
    except Exception:  # a lock, a file, a connection: no network computes with those
        return value


def _names(code: CodeType) -> set[str]:
    """The globals that a function reads, functions within it included."""
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _is_mutable(value: Any) -> bool:
    return isinstance(value, nn.Module | Tensor | MutableMapping | MutableSequence | set)


Mode = bool | list[bool]  # whether all of a network is in train mode, or each of its modules


def modes_of(model: nn.Module) -> dict[str, Mode]:
    """The modes that a network (a copy) is run in: eval, train, and its own where some of its modules alone train."""
    given, others = [module.training for module in model.modules()], []
    for training in (False, True):
        model.train(training)
        others.append([module.training for module in model.modules()])
    return {"eval": False, "train": True} | ({} if given in others else {"own": given})


def set_mode(model: nn.Module, mode: Mode) -> None:
    if isinstance(mode, bool):
        model.train(mode)
        return
    for module, training in zip(model.modules(), mode, strict=True):
        module.training = training


@contextmanager
def gradients(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Gradients enabled as in training while no parameter asks for one: code that looks takes the branch of training,
    and no graph is kept."""
    asked = [p for p in model.parameters() if enabled and p.requires_grad and p.is_leaf]  # scripted ones are not
    for p in asked:
        p.requires_grad_(False)
    try:
        with torch.set_grad_enabled(enabled):
            yield
    finally:
        for p in asked:
            p.requires_grad_(True)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """model(*inputs); InputError, in one line, names the module that raises and keeps the words of what it raised."""
    try:
        with _eagerly():
            return model(*inputs.args, **inputs.kwargs)
    except InputError:
        raise
    except Exception as error:  # whatever a network raises on inputs that it cannot take
        alone = any(tensor.dim() > 0 and tensor.size(0) == 1 for tensor in inputs.tensors())
        hint = "; an example has a batch of 2 or more" if alone else ""
        raise InputError(f"the network cannot run on its example: {told(model, error)}{hint}") from error


def _eagerly() -> AbstractContextManager:
    """Runs what torch.compile has wrapped as it was written: compiled code calls no function that can be followed."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def told(model: nn.Module, error: Exception) -> str:
    """The innermost module of `model` in which an error was raised, and what it says, in one line."""
    where = raised_in(model, error)
    return f"{f'{where}: ' if where else ''}{type(error).__name__}: {_first_line(error)}"


def raised_in(model: nn.Module, error: BaseException) -> str:
    """The path of the innermost module of `model` in which an error was raised, '' where it is the network itself."""
    paths, where, trace = {id(module): path for path, module in model.named_modules()}, "", error.__traceback__
    while trace is not None:
        where = paths.get(id(trace.tb_frame.f_locals.get("self")), where)
        trace = trace.tb_next
    return where


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).strip().splitlines()), "no message")


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


# Random states, and the default dtype that a trial sets, are those of all threads: one at a time keeps them.
_KEEPING = RLock()


@contextmanager
def keep_random_state(model: nn.Module) -> Iterator[None]:
    """Random states of torch, numpy and Python as they were, whatever a forward pass draws."""
    with _KEEPING, torch.random.fork_rng(_devices(model)):
        states = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def set_random_state(model: nn.Module, seed: int) -> None:
    """Seeds what `keep_random_state` restores: torch.manual_seed would also seed the devices of others."""
    for generator in _generators(model):
        generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state(model: nn.Module) -> tuple:
    """What changes when a forward pass draws random numbers."""
    kind, keys, *position = np.random.get_state()
    drawn = [generator.get_state().numpy().tobytes() for generator in _generators(model)]
    return drawn, random.getstate(), (kind, keys.tobytes(), position)


def _generators(model: nn.Module) -> list[torch.Generator]:
    on_cuda = _devices(model) if torch.cuda.is_initialized() else []
    return [torch.default_generator, *(torch.cuda.default_generators[device] for device in on_cuda)]

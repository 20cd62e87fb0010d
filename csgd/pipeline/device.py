"""The device of a run, and the network on it."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from csgd import ranks
from csgd.data import Data
from csgd.errors import InputError, line_of
from csgd.graph.twin import tensors_in
from csgd.pipeline.spec import Machine
from csgd.train import logits_of, loss_of, score_of

VECTOR = 16  # float32 entries of the largest vector register of a CPU


def place(model: nn.Module, device: torch.device, precision: torch.dtype = torch.float32) -> nn.Module:
    """`model` on its device, in the layout in which convs run fastest there."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model._target_ must make a torch.nn.Module, got {type(model).__name__}")
    # Channels-last: about 1.4 times faster on a CPU, and what the tensor cores of a GPU work on.
    if device.type != "cpu" and precision == torch.float32:
        return model.to(device)
    model = model.to(device, memory_format=torch.channels_last)
    for module in model.modules() if device.type == "cpu" else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1):
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            module.register_forward_pre_hook(_few_channels_first)
    return model


def _few_channels_first(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Keeps a strided conv of one pixel from reading a few channels in channels-last layout.

    oneDNN's gradient of its weights writes past a buffer there, for fewer channels than a vector register holds
    (https://github.com/uxlfoundation/oneDNN/issues/6035), and a cut can leave as few.
    """
    few = inputs and inputs[0].size(1) < VECTOR * conv.groups
    return inputs[0].contiguous() if few else None


def as_trained(model: nn.Module, compiles: bool) -> nn.Module:
    """`model` as the training loop calls it, with the same parameters; to be made anew after a cut."""
    if not compiles:
        return ranks.parallel(model)
    compiled = torch.compile(model)
    # Else the last batch of an epoch, which is smaller, would be compiled for too.
    compiled.register_forward_pre_hook(lambda _, images: torch._dynamo.maybe_mark_dynamic(images[0], 0))
    return ranks.parallel(compiled)


def check_fit(model: nn.Module, data: Data) -> None:
    """InputError if the network cannot take the images, or its outputs are no logits where these are asked for."""
    try:
        with torch.no_grad():
            outputs = logits_of(model.eval()(data.example))
        shape = list(outputs.shape)
    except Exception as error:  # whatever a network raises on images that it cannot take
        raise InputError(f"the model cannot take images of {list(data.example.shape[1:])}: {error}") from None
    is_task = data.criterion or data.score
    if not is_task and (len(shape) != 2 or shape[1] < data.num_classes):
        raise InputError(f"the model must return logits [n, {data.num_classes}], got {shape}")


@torch.no_grad()
def check_task(model: nn.Module, data: Data, label_smoothing: float = 0.0) -> None:
    """InputError if the data's own criterion or score does not fit the network, by the first images of the test."""
    if data.criterion and label_smoothing:
        raise InputError("schedule.label_smoothing must be 0 with a criterion of the data's own: it is cross entropy's")
    if not (data.criterion or data.score):
        return
    images, targets = next(data.test_batches())
    if not len(images):  # a batch of fewer images than there are ranks
        return
    outputs, part = model.eval()(images), "criterion"
    rows = list(tensors_in(outputs))
    told = f"on outputs {', '.join(str(list(t.shape)) for t in rows)} and targets {list(targets.shape)}"
    try:
        loss = loss_of(data, outputs, targets)
        part = "score"
        score = score_of(data, [t.cpu() for t in rows], targets.cpu())
    except Exception as error:  # whatever code of the user's raises
        raise InputError(f"dataset: {part} '{data.task[part]}' fails {told}: {line_of(error)}") from None
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise InputError(f"dataset: criterion '{data.task['criterion']}' must return a tensor of one number {told}")
    if math.isnan(score):
        raise InputError(f"dataset: score '{data.task['score']}' is not a number {told}")


@contextmanager
def threads_of(machine: Machine) -> Iterator[None]:
    """Within it there are as many CPU threads as the machine is to have; what was compiled before it is forgotten.

    The next job of a sweep has torch's own number again.
    """
    before = torch.get_num_threads()
    if machine.threads:
        torch.set_num_threads(machine.threads)
    if machine.compile:
        torch.compiler.reset()  # torch compiles a forward for 8 networks, and runs the next ones as they are
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_compiler(device: torch.device) -> None:
    """InputError if torch.compile does not work here, as without a C++ compiler, or on a GPU without Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of each backend its own
        raise InputError(f"compile=true: torch cannot compile here: {line_of(error)}") from error


def device_of(device: str, threads: int | None = None) -> torch.device:
    """auto | cpu | cuda → the device of this rank; sets the number of CPU threads where it is given."""
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: torch sees no CUDA device here; device=auto or device=cpu runs on the CPU")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"

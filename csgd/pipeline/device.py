"""The device of a run, and the network on it."""

import os

import torch
from torch import Tensor, nn

from csgd import ranks
from csgd.data import Data
from csgd.errors import InputError
from csgd.train import logits_of

VECTOR = 16  # float32 entries of the largest vector register of a CPU


def placed(model: nn.Module, device: torch.device, precision: torch.dtype = torch.float32) -> nn.Module:
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
    try:
        with torch.no_grad():
            outputs = logits_of(model.eval()(data.example))
        shape = list(outputs.shape)
    except Exception as error:  # whatever a network raises on images that it cannot take
        raise InputError(f"the model cannot take images of {list(data.example.shape[1:])}: {error}") from None
    if len(shape) != 2 or shape[1] < data.num_classes:
        raise InputError(f"the model must return logits [n, {data.num_classes}], got {shape}")


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

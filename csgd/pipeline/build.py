"""The device of a run and the network on it; and where a result comes from: versions, commit."""

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import csgd
from csgd import ranks
from csgd.data import Data
from csgd.errors import InputError
from csgd.train import logits_of

VECTOR = 16  # float32 entries of the largest vector register of a CPU
GIT_SECONDS = 10  # that git may take for an answer
GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def placed(model: nn.Module, device: torch.device, precision: str = "fp32") -> nn.Module:
    """`model` on its device, in the layout in which convs run fastest there."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model._target_ must make a torch.nn.Module, got {type(model).__name__}")
    # Channels-last: about 1.4 times faster on a CPU, and what the tensor cores of a GPU work on.
    if device.type != "cpu" and precision == "fp32":
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


def as_trained(cfg: Any, model: nn.Module) -> nn.Module:
    """`model` as the training loop calls it, with the same parameters; to be made anew after a cut."""
    if not cfg.compile:
        return ranks.parallel(model)
    compiled = torch.compile(model)
    # Else the last batch of an epoch, which is smaller, would be compiled for too.
    compiled.register_forward_pre_hook(lambda _, images: torch._dynamo.maybe_mark_dynamic(images[0], 0))
    return ranks.parallel(compiled)


def scaler_of(cfg: Any, device: torch.device) -> GradScaler | None:
    """What keeps the gradients of float16 from underflowing."""
    return GradScaler(device.type) if cfg.precision == "fp16" else None


def average_of(cfg: Any, model: nn.Module) -> AveragedModel | None:
    """A copy of `model` that will follow its weights and running statistics as their moving average."""
    decay = cfg.schedule.ema
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


def check_fit(model: nn.Module, data: Data) -> None:
    try:
        with torch.no_grad():
            outputs = logits_of(model.eval()(data.example))
        shape = list(outputs.shape)
    except Exception as error:  # whatever a network raises on images that it cannot take
        raise InputError(f"the model cannot take images of {list(data.example.shape[1:])}: {error}") from None
    if len(shape) != 2 or shape[1] < data.num_classes:
        raise InputError(f"the model must return logits [n, {data.num_classes}], got {shape}")


def device_of(cfg: Any) -> torch.device:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: torch sees no CUDA device here; device=auto or device=cpu runs on the CPU")
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "hydra-core", "wandb", "onnx", "onnxruntime")
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def code() -> str:
    """A hash of the package's own files: other code may give other bits."""
    root = Path(csgd.__file__).parent
    sources = [path.relative_to(root).as_posix().encode() + path.read_bytes() for path in sorted(root.rglob("*.py"))]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def commit(package: Path = Path(csgd.__file__).parent) -> str | None:
    """The commit of csgd's own checkout, with "-dirty" behind it if files that it tracks differ; else None.

    None as well where the package lies in a repository of the user's, or git is missing, hangs or refuses: where a
    result comes from is worth telling, and no reason to lose it.
    """
    package = package.resolve()
    try:
        top, head = _git(package, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != package.parent:
            return None
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    """What git says in `folder`, whatever repository the environment names; it takes no lock and starts no daemon."""
    environment = {key: value for key, value in os.environ.items() if key not in GIT_PLACES}
    done = subprocess.run(
        ["git", "-c", "core.fsmonitor=false", *arguments],
        cwd=folder,
        env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_SECONDS,
    )
    return done.stdout

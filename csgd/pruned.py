"""The pruned network as a folder: pruned.safetensors, and pruned.json that says how to build what it fits."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from csgd.build import call, judged, makes, off_the_path, within
from csgd.checkpoint import save_weights, write_json
from csgd.errors import InputError, line_of
from csgd.reload import load_trimmed
from csgd.train import logits_of

WEIGHTS, DESCRIPTION = "pruned.safetensors", "pruned.json"
FORMAT = 1
LARGEST = 2**26  # numbers that a network may make, or 1000 times those of its file, and that an input may have
KEYS = {"format": int, "sha256": str, "model": dict, "num_classes": int, "input": list, "widths": dict}


def save_pruned(
    folder: Path | str,
    model: nn.Module,
    settings: Mapping[str, Any],
    example: Tensor,
    num_classes: int,
    widths: Mapping[str, int] | None = None,
    **facts: Any,
) -> None:
    """Writes `model` into `folder`, so that `load_pruned` rebuilds it in a process that knows nothing of this one.

    settings  {"_target_": "mynet.Net", ...}: what makes the wide network; it is offered num_classes and image_size
    example   [n, ...] a batch of inputs
    widths    {space name: width}, as `target_widths` returns them
    facts     plain JSON that is kept beside them: verdict, versions
    """
    folder = Path(folder)
    save_weights(folder / WEIGHTS, model.state_dict())
    described = {
        "format": FORMAT,
        "sha256": _sha256(folder / WEIGHTS),
        "model": dict(settings),
        "num_classes": num_classes,
        "input": list(example.shape[1:]),
        "widths": dict(widths or {}),
    }
    write_json(folder / DESCRIPTION, described | facts)


def load_pruned(folder: Path | str, model: nn.Module | None = None, *, allow: Collection[str] = ()) -> nn.Module:
    """The pruned network in `folder`, on the CPU and in eval mode.

    It is built as pruned.json says, or from a wide `model` that is given.  Nothing is unpickled or downloaded, and
    what pruned.json names is judged before it is imported or called: by themselves only the networks of csgd.models,
    torchvision.models and torch.nn are, others on the user's word, allow=["mynet"].  InputError if a file is missing,
    changed, or does not fit the others.
    """
    folder = Path(folder)
    described = describe(folder)
    path = folder / WEIGHTS
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":  # every safetensors file has it there, after the length of its header
            raise InputError(f"'{path}' is not a safetensors file; pickles are not loaded")
    if _sha256(path) != described["sha256"]:
        raise InputError(f"'{path}' is not the file that {DESCRIPTION} describes: its SHA-256 is another")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise InputError(f"'{path}' is damaged: {error}") from None
    _check_widths(state, described["widths"])
    with off_the_path(folder) if not allow else nullcontext():  # what the user allows may lie there
        count = sum(tensor.numel() for tensor in state.values())
        wide = _wide(described, allow, max(LARGEST, 1000 * count)) if model is None else model
        like = next(wide.parameters(), torch.empty(0))
        example = torch.zeros(2, *described["input"], dtype=like.dtype, device=like.device)
        model = load_trimmed(wide, state, example=example, widths=described["widths"]).eval()
        _check_outputs(model, example, described["num_classes"])
    return model


def describe(folder: Path | str) -> dict[str, Any]:
    """What pruned.json says, its keys checked."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder")
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            pickles = [path.name for path in sorted(folder.glob("pruned.*")) if path.suffix in (".pt", ".pth", ".bin")]
            hint = f"; '{pickles[0]}' is a pickle and is not loaded" if pickles and name == WEIGHTS else ""
            raise InputError(f"'{folder}' is incomplete: {name} is missing{hint}")
    path = folder / DESCRIPTION
    try:
        described = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged: {error}") from None
    for key, kind in KEYS.items():
        if not isinstance(described, dict) or not isinstance(described.get(key), kind):
            raise InputError(f"'{path}' is damaged: it has no '{key}' of type {kind.__name__}")
    if described["format"] != FORMAT:
        raise InputError(f"'{path}' is of format {described['format']}, this csgd reads format {FORMAT}")
    if not isinstance(described["model"].get("_target_"), str):
        raise InputError(f"'{path}' is damaged: model has no '_target_'")
    if not described["input"] or not all(isinstance(size, int) and size > 0 for size in described["input"]):
        raise InputError(f"'{path}' is damaged: input must be a list of sizes, got {described['input']}")
    if math.prod(described["input"]) > LARGEST:
        raise InputError(f"'{path}' is damaged: input {described['input']} has more than {LARGEST:,} numbers")
    return described


class _TooLargeError(Exception):
    pass


class _Bounded(TorchDispatchMode):
    """Raises _TooLargeError before more than `left` numbers are made."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], list | tuple) and all(isinstance(size, int) for size in args[0]):
            self.left -= math.prod(args[0])  # what begins with a size makes a tensor
            if self.left < 0:
                raise _TooLargeError
        return func(*args, **(kwargs or {}))


def _wide(described: Mapping[str, Any], allow: Collection[str], largest: int) -> nn.Module:
    settings = described["model"]
    target = settings["_target_"]
    instead = "load_pruned(folder, model) takes a wide network that you made"
    made = judged("model", target, NETWORKS, allow, instead)
    offered = dict(num_classes=described["num_classes"], image_size=described["input"][-1])
    if not within(target, allow):
        for key, value in settings.items():
            if value and ("weights" in key or "pretrained" in key):
                raise InputError(
                    f"model.{key} '{value}' of {DESCRIPTION} is not downloaded; {instead}, "
                    f'allow=["{target}"] (--allow {target}) downloads it'
                )
        offered |= dict(weights=None, weights_backbone=None)  # some builders of torchvision would download them
    try:
        with nullcontext() if within(target, allow) else _Bounded(largest):
            model = call("model", made, settings, **offered)
    except _TooLargeError:
        raise InputError(
            f"model._target_ '{target}' is not made: by the settings of {DESCRIPTION} it has more than {largest:,} "
            f"numbers, too many for its file; {instead}"
        ) from None
    except InputError:
        raise
    except Exception as error:  # whatever a user's class raises on settings that it cannot take
        why = f"fails on the settings of {DESCRIPTION}: {line_of(error)}"
        raise InputError(f"model._target_ '{target}' {why}") from None
    if not isinstance(model, nn.Module):
        raise InputError(f"model._target_ '{target}' must make a torch.nn.Module, got {type(model).__name__}")
    return model


def _is_network_class(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, nn.Module)


def _is_torchvisions(made: Any) -> bool:
    """A class, or a builder that torchvision lists: other functions there take networks and names of builders."""
    from torchvision import models

    return _is_network_class(made) or made in map(models.get_model_builder, models.list_models())


NETWORKS = {  # what a folder may name on its own word
    "csgd.models": lambda made: makes(made, nn.Module),
    "torchvision.models": _is_torchvisions,
    "torch.nn": lambda made: _is_network_class(made) and made.__module__.startswith("torch.nn.modules."),
}


def _check_widths(state: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """A width of pruned.json is at most that of the weight it is said of: one weight can have several spaces."""
    for name, width in widths.items():
        weight = state.get(f"{name}.weight")
        if weight is not None and not (isinstance(width, int) and 0 < width <= max(weight.shape)):
            raise InputError(
                f"{DESCRIPTION}: width {width} of '{name}' does not fit its weight of {list(weight.shape)}"
            )


@torch.no_grad()
def _check_outputs(model: nn.Module, example: Tensor, num_classes: int) -> None:
    try:
        outputs = logits_of(model(example))
    except Exception as error:  # whatever a network raises whose layers do not fit together
        shape = list(example.shape[1:])
        raise InputError(f"{WEIGHTS} does not fit together, it cannot take {shape}: {line_of(error)}") from None
    if outputs.shape[-1] < num_classes:
        raise InputError(f"{DESCRIPTION}: num_classes is {num_classes}, the network has {outputs.shape[-1]} outputs")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

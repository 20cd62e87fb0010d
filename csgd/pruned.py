"""The pruned network as a folder: pruned.safetensors, and pruned.json that says how to build what it fits."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from csgd.build import build, makes, named
from csgd.checkpoint import save_weights, write_json
from csgd.errors import InputError
from csgd.reload import load_trimmed
from csgd.train import logits_of

WEIGHTS, DESCRIPTION = "pruned.safetensors", "pruned.json"
FORMAT = 1
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


def load_pruned(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The pruned network in `folder`, on the CPU and in eval mode.

    It is built as pruned.json says, or from a wide `model` that is given.  Nothing is unpickled, and what pruned.json
    names is called only if it makes a network: a subclass of nn.Module, or a function annotated to return one.
    InputError if a file is missing, changed, or does not fit the others.
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
    model = load_trimmed(_wide(described) if model is None else model, state).eval()
    _check_outputs(model, described)
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
        described = json.loads(path.read_text())
    except ValueError as error:
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
    return described


def _wide(described: Mapping[str, Any]) -> nn.Module:
    settings = described["model"]
    target = settings["_target_"]
    if not makes(named("model", target), nn.Module):
        raise InputError(
            f"model._target_ '{target}' is not called: it is neither a torch.nn.Module nor a function annotated to "
            "return one; load_pruned(folder, model) takes a wide network of your own making"
        )
    try:
        return build("model", settings, num_classes=described["num_classes"], image_size=described["input"][-1])
    except InputError:
        raise
    except Exception as error:  # whatever a user's class raises on settings that it cannot take
        raise InputError(f"model._target_ '{target}' fails on the settings of {DESCRIPTION}: {error}") from None


def _check_widths(state: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """A width of pruned.json is at most that of the weight it is said of: one weight can have several spaces."""
    for name, width in widths.items():
        weight = state.get(f"{name}.weight")
        if weight is not None and not (isinstance(width, int) and 0 < width <= max(weight.shape)):
            raise InputError(
                f"{DESCRIPTION}: width {width} of '{name}' does not fit its weight of {list(weight.shape)}"
            )


@torch.no_grad()
def _check_outputs(model: nn.Module, described: Mapping[str, Any]) -> None:
    shape, num_classes = described["input"], described["num_classes"]
    try:
        outputs = logits_of(model(torch.zeros(2, *shape)))
    except Exception as error:  # whatever a network raises whose layers do not fit together
        raise InputError(f"{WEIGHTS} does not fit together, it cannot take {shape}: {error}") from None
    if outputs.shape[-1] < num_classes:
        raise InputError(f"{DESCRIPTION}: num_classes is {num_classes}, the network has {outputs.shape[-1]} outputs")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

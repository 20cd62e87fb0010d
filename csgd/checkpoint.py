"""Files: checkpoints of a run, weights of a network, the pruned network.  Nothing is written in place."""

import json
import logging
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csgd.errors import InputError, line_of

log = logging.getLogger(__name__)

WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state` under `path` in one stroke; the checkpoint that was there stays as *.previous."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".writing")
    torch.save(dict(state), scratch)
    _to_disk(scratch)
    if path.exists():
        os.replace(path, path.with_suffix(path.suffix + ".previous"))
    os.replace(scratch, path)


def _to_disk(path: Path) -> None:
    """Waits until a file is written: a new name may else outlive a loss of power that its content does not."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint under `path`, or the previous one if that was cut short; None if there is none.

    InputError if there are files and none of them can be read: a run that started anew would overwrite them.
    """
    damaged = {}
    for candidate in (path, path.with_suffix(path.suffix + ".previous")):
        if not (candidate.exists() or candidate.is_symlink()):  # a link to a disk that is not there
            continue
        try:
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}, which is no checkpoint of a run")
        except Exception as error:  # zip, pickle and runtime errors, as the damage falls
            damaged[candidate] = line_of(error)
            continue
        for other in damaged:
            log.warning("%s is damaged (%s), the one before it is used", other, damaged[other])
        return state
    if damaged:
        told = " and ".join(f"'{candidate}' ({why})" for candidate, why in damaged.items())
        raise InputError(f"resume=auto: {told} cannot be read; move the folder away or say resume=never to start anew")
    return None


def save_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """A state_dict as safetensors; tied weights are written under each of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".writing")
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}, scratch)
    _to_disk(scratch)
    os.replace(scratch, path)


def load_weights(path: Path, said: str = "base.weights") -> dict[str, Tensor]:
    """A state_dict from a .safetensors or a torch file, bare or under the key 'state_dict'; errors begin with `said`.

    InputError if the file is not there, truncated, or a pickle of anything but tensors.
    """
    if not path.is_file():
        raise InputError(f"{said} '{path}' is not a file")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{said} '{path}' is a pointer of Git LFS, not the weights; git lfs pull fetches them")
    if head.lstrip().startswith(b"<"):
        raise InputError(f"{said} '{path}' is a web page, not weights: its download led elsewhere")
    is_torchs = head.startswith((b"PK", b"\x80"))  # a zip, or a bare pickle
    try:
        if head[8:9] == b"{" or (path.suffix == ".safetensors" and not is_torchs):
            state = load_file(path)
        else:
            with warnings.catch_warnings(), path.open("rb") as file:  # by its name torch would judge its content
                warnings.simplefilter("ignore")  # about protocols of pickles, which are refused below
                state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not is_torchs:
            raise InputError(f"{said} '{path}' is of an unknown format") from None
        raise InputError(
            f"{said} '{path}' is a pickle of more than tensors and is not loaded; save the state_dict alone"
        ) from None
    except Exception as error:  # zip, pickle and runtime errors, as the damage falls
        raise InputError(f"{said} '{path}' is damaged or of an unknown format: {line_of(error)}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    named = isinstance(state, Mapping) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(map(repr, list(state)[:5])) if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise InputError(f"{said} '{path}' does not hold a state_dict, but {found}; save the state_dict alone")
    while prefix := next((p for p in WRAPPERS if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    _to_disk(scratch)
    os.replace(scratch, path)

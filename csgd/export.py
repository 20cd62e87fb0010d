"""The pruned network for other programs, checked against PyTorch; and its latency beside the dense one's."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from csgd.errors import InputError
from csgd.verify import relative_change

FORMATS = {"onnx": ("onnx",), "torch": ("torch",), "all": ("onnx", "torch")}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # largest change of an image's outputs / their spread (max − min), in float32
ROUNDS, LEAST_ROUNDS = 31, 5  # of a latency, at most and at least


def check_packages(export: str) -> None:
    """InputError if what `export` needs is not installed: said before a run, not after it."""
    missing = [name for name in PACKAGES if find_spec(name) is None] if "onnx" in FORMATS[export] else []
    if missing:
        raise InputError(f"export={export} needs {', '.join(missing)}: pip install {' '.join(PACKAGES)}")


def export(kind: str, model: nn.Module, example: Tensor, path: Path) -> float:
    """Writes a `model` in eval mode on the CPU under `path`, for batches of any size; its largest `relative_change`.

    kind     onnx | torch
    example  [2, ...] images on the CPU

    InputError if the file answers batches of 1 and 3 otherwise than the model; the file is then removed.
    """
    write, read = {"onnx": (_write_onnx, _read_onnx), "torch": (_write_torch, _read_torch)}[kind]
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
    try:
        write(program, path)
        return _checked(read(path), model, example, path.name)
    except Exception:
        if path.is_file():
            path.unlink()
        raise


def latency(models: Mapping[str, nn.Module], images: Tensor, seconds: float = 10.0) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of each model: median and quartiles of 31 rounds, fewer after `seconds`.

    The models take turns, so that what slows the machine for a while falls on all of them.
    """
    times = {name: [] for name in models}
    started = time.perf_counter()
    with torch.inference_mode():
        for number in range(-2, ROUNDS):  # two rounds to warm up
            if number >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
                break
            for name, model in models.items():
                milliseconds = _milliseconds(model, images)
                if number >= 0:
                    times[name].append(milliseconds)
    return {name: _spread(values) for name, values in times.items()}


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every pass over the graph
    named = dict(input_names=["images"], output_names=["logits"])
    torch.onnx.export(program, dynamo=True, verbose=False, **named).save(path)


def _read_onnx(path: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    return lambda batch: [torch.from_numpy(output) for output in session.run(None, {images.name: batch.numpy()})]


def _write_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _read_torch(path: Path) -> Callable[[Tensor], Any]:
    return torch.export.load(path).module()


@torch.no_grad()
def _checked(answer: Callable[[Tensor], Any], model: nn.Module, example: Tensor, name: str) -> float:
    largest = 0.0
    for batch in (example[:1], torch.cat([example, example[:1].flip(-1)])):
        change = float(relative_change(model(batch), answer(batch)).max())
        if not change <= TOLERANCE:
            raise InputError(
                f"{name} answers a batch of {len(batch)} otherwise than PyTorch: relative change {change:.1e}, "
                f"at most {TOLERANCE:.0e} is allowed"
            )
        largest = max(largest, change)
    return largest


def _milliseconds(model: nn.Module, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def _spread(values: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median_ms": median, "lower_quartile_ms": lower, "upper_quartile_ms": upper, "rounds": len(values)}

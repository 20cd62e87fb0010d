"""What the benchmarks share: contenders that take turns, their ratios, a table in the terminal and a JSON file."""

import argparse
import json
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from csgd.pipeline.provenance import commit, versions  # noqa: E402
from csgd.report import table  # noqa: E402


def arguments(doc: str, **folders: str) -> argparse.Namespace:
    """--quick, --output, --threads, --device: what the benchmarks take; on a GPU the number of threads is ignored.

    `folders` are further options and what they say of themselves.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer networks and repeats: a minute or less")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder of the JSON file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()], help="one measurement for each")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cuda: of the steps, on a GPU")
    for option, told in folders.items():
        parser.add_argument(f"--{option}", type=Path, help=told)
    given = parser.parse_args()
    if given.device.type == "cuda":
        given.threads = given.threads[:1]
    return given


class Peak(TorchDispatchMode):
    """Bytes of the storages that are made within it, at their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in given | self.seen:
                self.seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage.nbytes(), storage.data_ptr())
        return out

    def release(self, size: int, address: int) -> None:
        self.now -= size
        self.seen.discard(address)


def synchronise() -> None:
    """Waits for the GPU, if there is one at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turns(contenders: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender, turn by turn: what slows the machine down for a while slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warmup, repeats):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            synchronise()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": middle, "low": low, "high": high, "n": len(seconds)}


def ratio(seconds: Sequence[float], to: Sequence[float]) -> float:
    """The median of the ratios within each turn."""
    return statistics.median(a / b for a, b in zip(seconds, to, strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    found = {key: 1000 * value for key, value in summary(seconds).items()}
    return f"{found['median']:.3g} ({found['low']:.3g} … {found['high']:.3g})"


def leave(
    name: str, given: argparse.Namespace, header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Any
) -> None:
    """Prints the table, and writes `numbers` with machine, versions, commit and command to <output>/<name>.json."""
    print(f"\n{name}\n\n{table(header, rows)}\n", flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": " ".join(["python", f"experiments/bench/{name}.py", *sys.argv[1:]]),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if given.device.type == "cuda" else "cpu",
        "versions": versions(),
        "commit": commit(),
    }
    (given.output / f"{name}.json").write_text(json.dumps(facts | {"rows": numbers}, indent=2) + "\n")

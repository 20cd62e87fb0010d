"""Do two checkouts make the same runs?

    python experiments/compare_runs.py ../other-checkout --output outputs/compare

Runs small configurations with the other checkout and with this one, and compares what they leave: the bytes of
pruned.safetensors, filters.safetensors and clusters.json, the rows of metrics.jsonl, summary.json and plan.json, each
without its times, and exit codes.  The loss of a row may differ in its seventh digit, as it is a sum in another order.
Then this checkout's runs are killed with SIGKILL at random moments and resumed, and compared with the whole one.
What the other checkout has left in the output folder is used again; `--only` names some of the configurations.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = [
    "dataset=synthetic", "dataset.image_size=8", "dataset.num_classes=3", "dataset.train_size=240",
    "dataset.test_size=40", "model={_target_: small_nets.Small}", "deps.fraction=0.5", "schedule=smoke",
    "schedule.base={epochs: 1, lr: 0.05}", "schedule.csgd={epochs: 4, lr: 0.05}", "wandb=disabled", "quiet=true",
    "threads=1", "centri_strength=15", "ramp=constant", "after_trim=same_run", "schedule.weight_decay_vectors=1e-4",
]  # fmt: skip
CONFIGURATIONS = {
    "plain": [],
    "staged": ["deps.stages=[0.75,0.5]"],
    "average": ["schedule.ema=0.8", "deps.stages=[0.75,0.5]", "schedule.csgd={epochs: 5, lr: 0.05}"],
    "parts": ["schedule.accumulation=2", "schedule.csgd.clip_norm=1.0", "schedule.label_smoothing=0.1"],
    "end": ["trim_at=end", "ramp=linear", "centri_strength=20"],
    "sgd": ["after_trim=plain", "schedule.base.optimizer=adamw", "schedule.base.lr=3e-4", "clustering=even"],
    "auto": ["centri_strength=auto", "schedule.csgd.epochs=7"],
    "late": ["model._target_=small_nets.LeavesOut", "centri_strength=6", "schedule.csgd.epochs=5"],
    "half": ["precision=bf16", "seed=3"],
    "scaled": ["precision=fp16"],
    "ranks": ["distributed.nproc=2", "distributed.check_every=7"],
    "lossy": ["centri_strength=0.5"],
    "planned": ["plan_only=true", "deps.stages=[0.75,0.5]"],
    "fast": ["centri_strength=500"],  # diverges: refused
    "whole": ["deps.fraction=1"],  # nothing to trim: refused
    "single": ["schedule.batch_size=239"],  # and a batch of one image
}
KILLED = ["deps.stages=[0.75,0.5]", "schedule.ema=0.8", "schedule.csgd={epochs: 5, lr: 0.05}", "checkpoint_every=7"]
NETS = '''
import torch
from torch import nn


class Small(nn.Module):
    """Two convs whose channels a sum ties, batch norm, dropout."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.bn(self.stem(images)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.fc(self.drop(x.mean((2, 3))))


class LeavesOut(nn.Module):
    """A block that is left out of some steps, in which nothing pulls it: it collapses later than the forecast says."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.stem(images).relu()
        if not self.training or torch.rand(()) < 0.5:
            x = x + self.outer(self.inner(x).relu())
        return self.fc(x.mean((2, 3)))
'''


def start(checkout: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small_nets.py").write_text(NETS)
    paths = os.pathsep.join([str(checkout), str(folder)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(checkout / "run.py"), *SMALL, "hydra.run.dir=out", *overrides]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, folder: Path) -> int:
    status = process.wait()
    (folder / "status.txt").write_text(str(status))
    return status


def without_times(value: Any) -> Any:
    """The same without seconds, without what names a commit, a version or a place, and without the configuration."""
    left_out = ("seconds", "versions", "commit", "command", "config", "source", "bytes", "device", "cache")
    left_out += (
        "deviation/",
        "csgd/deviation",
        "left/",
        "forecast",
        "conditions",
    )  # other names or units since cb212b9
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(part in k for part in left_out)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def rows(path: Path) -> list[dict]:
    return [without_times(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def equal(one: Any, other: Any, key: str = "") -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k], k) for k in one)
    if key.endswith("/loss"):
        return math.isclose(one, other, rel_tol=1e-5)
    return one == other or (one != one and other != other)


def within(one: Any, other: Any) -> bool:
    """Whether they are the same but for keys that only the other has."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(within(value, other.get(key)) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(within, one, other))
    return one == other


def differences(one: Path, other: Path) -> Iterator[str]:
    """What is not the same in two folders of runs."""
    for name in ("pruned.safetensors", "filters.safetensors", "clusters.json"):
        if (a := contents(one / "out" / name)) != contents(other / "out" / name):
            yield name if a else f"{name}, which one of them lacks"
    for name in ("summary.json", "plan.json", "pruned.json"):
        a, b = (without_times(json.loads(text)) if (text := contents(f / "out" / name)) else {} for f in (one, other))
        yield from (f"{name}: {key}" for key in a if not within(a[key], b.get(key)))
    a, b = (rows(folder / "out" / "metrics.jsonl") for folder in (one, other))
    if len(a) != len(b):
        yield f"{len(a)} rows and {len(b)}"
    for number, (row, counterpart) in enumerate(zip(a, b, strict=False), 1):
        keys = sorted(row.keys() | counterpart.keys())
        yield from (f"row {number}: {k}" for k in keys if not equal(row.get(k), counterpart.get(k), k))
    a, b = ((folder / "status.txt").read_text() for folder in (one, other))
    if a != b:
        yield f"exit codes {a} and {b}"
    if a == "2" and (a := last_line(one)) != (b := last_line(other)):
        yield f"refused by '{a}' and '{b}'"


def contents(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def last_line(folder: Path) -> str:
    return (folder / "log.txt").read_text().strip().splitlines()[-1]


def compared(output: Path, other: Path, name: str, overrides: list[str]) -> bool:
    folders = [output / "other" / name, output / "this" / name]
    for checkout, folder in zip((other, ROOT), folders, strict=True):
        if checkout == ROOT:
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "status.txt").exists():
            finish(start(checkout, folder, *overrides), folder)
    found = list(differences(*folders))
    status = (folders[0] / "status.txt").read_text()
    print(f"{name}: {'; '.join(found) if found else 'the same'}, exit code {status}", flush=True)
    return not found


def killed(output: Path, rng: random.Random, number: int, seconds: float) -> bool:
    """Kills a run, twice, and compares it with the whole one at its end."""
    folder, moments = output / "this" / f"killed-{number}", []
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(2):
        process = start(ROOT, folder, *KILLED, "resume=auto")
        moments.append(rng.uniform(0.3, 0.95) * seconds)
        time.sleep(moments[-1])
        process.kill()
        process.wait()
    finish(start(ROOT, folder, *KILLED, "resume=auto"), folder)
    found = list(differences(output / "this" / "undisturbed", folder))
    times = " and ".join(f"{moment:.1f} s" for moment in moments)
    print(f"killed after {times} of {seconds:.1f}: {'; '.join(found) if found else 'the same'}", flush=True)
    return not found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    output, other = given.output.resolve(), given.other.resolve()
    names = CONFIGURATIONS if given.only is None else given.only
    same = [compared(output, other, name, CONFIGURATIONS[name]) for name in names]
    if given.kills:
        folder, began = output / "this" / "undisturbed", time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        finish(start(ROOT, folder, *KILLED), folder)
        seconds, rng = time.perf_counter() - began, random.Random(given.seed)
        same += [killed(output, rng, number, seconds) for number in range(1, given.kills + 1)]
    print(f"{sum(same)} of {len(same)} the same")
    sys.exit(not all(same))


if __name__ == "__main__":
    main()

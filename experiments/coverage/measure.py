"""How much of networks that people use can be cut exactly, and how long is it sought?  One row a network.

    OMP_NUM_THREADS=1 python experiments/coverage/measure.py            adds what is missing to rows.jsonl
    OMP_NUM_THREADS=1 python experiments/coverage/measure.py --only timm

Each network has a process of its own.  All spaces go to half of their widths, clusters are runs; the proof is csgd's,
on a float64 twin with random weights, in eval and in train mode.  Beside it Torch-Pruning cuts the same network to
half: what counts is whether it raises, and whether the network runs afterwards and answers in the same shapes.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from networks import build, networks
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import csgd
from csgd.graph import Inputs
from csgd.graph.twin import run, tensors_in
from csgd.verify import count_params

ROWS = Path(__file__).parent / "rows.jsonl"
LIMIT = 150  # seconds a network may take
REASONS = 5  # of those that pin most channels


def macs(model: nn.Module, example: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model.eval(), Inputs.of(example))
    return counter.get_total_flops() // 2


def share_cut(narrow: nn.Module, wide: nn.Module, example: Any) -> dict[str, float]:
    return {
        "params": 1 - count_params(narrow) / count_params(wide),
        "macs": 1 - macs(narrow, example) / max(1, macs(wide, example)),
    }


def ours(model: nn.Module, example: Any) -> dict[str, Any]:
    started = time.perf_counter()
    spaces = csgd.find_spaces(model, example)
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "spaces": len(spaces)}
    pins: dict[str, int] = {}
    for space in spaces:
        for reason in space.pinned[:1]:
            pins[reason] = pins.get(reason, 0) + space.size
    row["pinned"] = dict(sorted(pins.items(), key=lambda pin: -pin[1])[:REASONS])
    row["conditional"] = sum(bool(space.conditions) for space in spaces if space.trimmable)
    if not any(space.trimmable for space in spaces):
        return row | {"outcome": "nothing is free"}
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    proof = csgd.prove(model, spaces, clusters, example)
    narrow = copy.deepcopy(model)
    csgd.trim(narrow, spaces, clusters, tolerance=None)
    outcome = "exact" if proof.exact else "inexact"
    return row | {
        "outcome": outcome,
        "changes": proof.changes,
        "control": proof.control,
        **share_cut(narrow, model, example),
    }


def torch_pruning(model: nn.Module, example: Any) -> dict[str, Any]:
    """By magnitude, as its own README does; of each output the last layer of its width is left alone."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    inputs = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        before = [t.shape for t in tensors_in(model.eval()(*inputs))]
    widths = {m: m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
    widths |= {m: m.out_channels for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    of_width = {widths[m]: m for m in model.modules() if m in widths}  # the last of each
    ignored = [of_width[shape[1]] for shape in before if len(shape) > 1 and shape[1] in of_width]
    started, wide = time.perf_counter(), copy.deepcopy(model)
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=ignored
    )
    pruner.step()
    row = {"seconds": time.perf_counter() - started}
    try:
        with torch.no_grad():
            after = [t.shape for t in tensors_in(model.eval()(*inputs))]
    except Exception as error:  # what a network raises whose layers do not fit each other
        return row | {"outcome": "breaks", "why": f"{type(error).__name__}: {error}"[:200]}
    if after != before:
        return row | {"outcome": "other shapes", **share_cut(model, wide, example)}
    return row | {"outcome": "runs", **share_cut(model, wide, example)}


def row_of(package: str, name: str) -> dict[str, Any]:
    try:
        model, example = build(package, name)
        row = {"params": count_params(model), "macs": macs(model, example)}
    except Exception as error:
        return {"outcome": "does not run", "why": f"{type(error).__name__}: {error}"[:200]}
    row["torch_pruning"] = {"outcome": f"no answer in {LIMIT} s"}
    for tool in (ours, torch_pruning):
        try:
            row[tool.__name__] = tool(model, example)
        except Exception as error:
            row[tool.__name__] = {"outcome": "raises", "why": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(row), flush=True)  # the next tool may take the process with it
    return row


def measured(package: str, name: str) -> dict[str, Any]:
    """The row of a network, from a process of its own."""
    command = [sys.executable, __file__, "--one", package, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired as late:
        lines = (late.stdout or b"").decode().splitlines()
        return json.loads(lines[-1]) if lines else {"outcome": f"took more than {LIMIT} s"}
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {"outcome": f"died: {done.stderr[-200:]}"}


def versions(package: str) -> dict[str, str]:
    names = ("torch", "torch-pruning", package.partition(".")[0].replace("_", "-"))
    return {name: version(name) for name in dict.fromkeys(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="networks of this package")
    parser.add_argument("--one", nargs=2, metavar=("PACKAGE", "NAME"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(row_of(*asked.one)))
        return
    done = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    seen = {(row["package"], row["name"]) for row in done}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for package, name in networks():
        if (package, name) in seen or (asked.only and asked.only != package):
            continue
        about = {"package": package, "name": name, "commit": commit, "threads": torch.get_num_threads()}
        row = about | {"versions": versions(package)} | measured(package, name)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            name, row.get("outcome") or {tool: row[tool]["outcome"] for tool in ("ours", "torch_pruning")}, flush=True
        )


if __name__ == "__main__":
    main()

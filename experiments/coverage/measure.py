"""How much of networks that people use can be cut exactly, and how long is it sought?  One row a network.

    OMP_NUM_THREADS=1 python experiments/coverage/measure.py               adds what is missing to rows.jsonl
    OMP_NUM_THREADS=1 python experiments/coverage/measure.py --only timm   of one package
    python experiments/coverage/measure.py --rows new.jsonl --others experiments/coverage/rows.jsonl
                                                   csgd anew, and what the other tools did from rows that are there

It may be stopped and started again, and run several times at once: each network is measured by one of them.

Each tool has a process of its own, and LIMIT seconds of its own.  Ours sends all spaces to half of their widths,
clusters are runs; the proof is csgd's, on a float64 twin with random weights, in eval and in train mode.  Beside it
Torch-Pruning and torch-kirigami cut the same network to half: what counts is whether they raise, and whether the
network runs afterwards and answers in the same shapes.
"""

import argparse
import copy
import fcntl
import json
import multiprocessing
import signal
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from networks import build, networks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import csgd
from csgd.graph import Inputs
from csgd.graph.twin import run, tensors_in
from csgd.verify import count_params

ROWS = Path(__file__).parent / "rows.jsonl"
LIMIT = 30  # CPU seconds that a tool may take for a network: others at work on the machine change them little
OURS = 240  # the same of csgd, with its proof
WALL = 1800  # seconds after which a process counts as stuck
FORK = multiprocessing.get_context("fork")
REASONS = 8  # of those that keep most multiply-accumulates


def counted(model: nn.Module, example: Any) -> dict[str, int]:
    """Multiply-accumulates by module path, those of the whole network under ''.

    All attention is counted as the products that it is made of, and recurrent layers as their steps.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    plainly = (sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False), torch.no_grad())
    with plainly[0], plainly[1], plainly[2], FlopCounterMode(display=False) as counter:
        run(model.eval(), Inputs.of(example))
    root = type(model).__name__
    counts = {
        path.removeprefix(root).removeprefix("."): sum(ops.values()) // 2 for path, ops in counter.flop_counts.items()
    }
    return counts | {"": counter.get_total_flops() // 2}


def share_cut(narrow: nn.Module, wide: nn.Module, example: Any) -> dict[str, float]:
    return {
        "params": 1 - count_params(narrow) / count_params(wide),
        "macs": 1 - counted(narrow, example)[""] / max(1, counted(wide, example)[""]),
    }


class Clock:
    """Seconds since it was made, by the clock on the wall and of this process."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def ours(model: nn.Module, example: Any) -> dict[str, Any]:
    clock = Clock()
    spaces = csgd.find_spaces(model, example)
    row: dict[str, Any] = clock.read() | {"spaces": len(spaces), "pinned": kept(model, spaces, example)}
    row["conditional"] = sum(bool(space.conditions) for space in spaces if space.trimmable)
    if not any(space.trimmable for space in spaces):
        return row | {"outcome": "nothing is free"}
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    proof = csgd.prove(model, spaces, clusters, example)
    csgd.merge_equal(model, spaces, clusters)  # so that a detector finds as many boxes before the cut as after
    narrow = copy.deepcopy(model)
    csgd.trim(narrow, spaces, clusters, tolerance=None)
    row |= {"outcome": "exact" if proof.exact else "inexact", "changes": proof.changes, "control": proof.control}
    if proof.failing:
        row["why"] = next(f"{name}: {why}" for name, why in proof.failing.items())
    return row | share_cut(narrow, model, example)


def kept(model: nn.Module, spaces: list[csgd.ChannelSpace], example: Any) -> dict[str, dict[str, float]]:
    """Of each reason the channels that it pins, and what share of the network's multiply-accumulates it keeps.

    A layer whose filters and input channels are all halved does a quarter of its work; what it does beyond that for
    pins is shared out among their reasons, by the rows and columns of its weight that they hold.
    """
    channels, work = Counter(), Counter()
    reasons: list[str] = []
    dims: dict[
        str, dict[int, Tensor]
    ] = {}  # of each weight and dim: 0 what no space indexes, −1 free, n of reason n − 1
    for space in sorted(spaces, key=lambda space: space.trimmable):  # where two spaces index a row, the free one counts
        if space.size < 2:
            continue
        if not space.trimmable:
            reason = space.pinned[0]
            channels[reason] += space.size
            reasons += [reason] if reason not in reasons else []
        for ref in space.refs:
            path, name = ref.owners[0]
            if ref.role in ("out", "key", "in"):
                whole = torch.zeros(ref.extent, dtype=torch.long)
                rows = dims.setdefault(f"{path}.{name}", {}).setdefault(ref.dim, whole)
                rows[ref.index.flatten().cpu()] = -1 if space.trimmable else 1 + reasons.index(reason)
    counts = counted(model, example)
    for weight, of_dim in dims.items():
        path, _, name = weight.rpartition(".")
        path = path.partition(".parametrizations")[0]
        if not path or name.startswith("bias") or path not in counts:
            continue
        free = [(rows < 0).double().mean().item() for rows in of_dim.values()]
        held = [(rows > 0).double().mean().item() for rows in of_dim.values()]
        does, least = 1.0, 1.0
        for one, other in zip(free, held, strict=True):
            does, least = does * (1 - one / 2), least * (1 - (one + other) / 2)
        for rows in of_dim.values():
            for number, share in zip(*rows[rows > 0].unique(return_counts=True), strict=True):
                of_all = share.item() / len(rows) / sum(held)
                work[reasons[number - 1]] += (does - least) * counts[path] * of_all / counts[""]
    most = sorted(reasons, key=lambda reason: -work[reason])[:REASONS]
    return {reason: {"channels": channels[reason], "macs": work[reason]} for reason in most}


def torch_pruning(model: nn.Module, example: Any) -> dict[str, Any]:
    """By magnitude, as its own README does; the layers that end in outputs are left alone."""
    import torch_pruning as tp

    ignored = _ends(model, example)
    clock = Clock()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ignored,
    )
    pruner.step()
    return clock.read()


def _ends(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers that an output ends in, or, where csgd does not tell, of each output the last layer of its width."""
    modules = dict(model.named_modules())
    try:
        spaces = csgd.find_spaces(model, example, trial=False)
        ends = [space for space in spaces if "network output" in space.pinned]
        return [modules[path] for space in ends for ref in space.producers for path, _ in ref.owners if path in modules]
    except csgd.InputError:
        widths = {m: m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
        widths |= {m: m.out_channels for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
        of_width = {widths[m]: m for m in model.modules() if m in widths}  # the last of each
        shapes = _shapes(model, example)
        return [of_width[shape[1]] for shape in shapes if len(shape) > 1 and shape[1] in of_width]


def torch_kirigami(model: nn.Module, example: Any) -> dict[str, Any]:
    """Every second channel of each axis that it lists, in one plan, as its own README does with exact positions.

    Its search by magnitude would ask for each channel alone: minutes for a ResNet-18.  An axis is left out if what its
    cut entails is not resolved, and, where the plan of all is refused, if its own plan is refused too.
    """
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import PlanningError, Pruner

    clock = Clock()
    graph = DependencyGraph.build(model, args=Inputs.of(example).args)
    pruner, half, entailed, refused = Pruner(model, graph=graph), [], [], []
    specs = filter(None, map(graph.operator_spec, graph.operations()))
    for axis, block in {one.axis: one.block_size for spec in specs for one in spec.candidates}.items():
        if any(impact.selection(axis.tensor).fully_selected_indices(axis.dim) for impact in entailed):
            continue
        every_second = [i for i in range(axis.tensor.shape[axis.dim]) if i // block % 2]
        impact = graph.propagate(remove=[axis.select(every_second)], constraints=pruner.constraints)
        if every_second and impact.status == "resolved":
            half.append(axis.select(every_second))
            entailed.append(impact)
        else:
            refused += map(str, impact.diagnostics)
    if not half:
        raise PlanningError(refused[0] if refused else "no axis")
    try:
        plan = pruner.plan_remove(half)
    except PlanningError as error:
        if not (half := [one for one in half if _has_plan(pruner, one)]):
            raise
        plan, refused = pruner.plan_remove(half), [told(error)]
    pruner.apply(plan)
    return clock.read() | {"refused": refused[:1]}


def _has_plan(pruner: Any, removal: Any) -> bool:
    try:
        return bool(pruner.plan_remove([removal]))
    except Exception:
        return False


def of_other(tool: Callable[[nn.Module, Any], dict[str, Any]], model: nn.Module, example: Any) -> dict[str, Any]:
    """What another tool makes of a network: it runs, answers in other shapes, or breaks."""
    wide = copy.deepcopy(model)
    before = _shapes(model, example)
    row = tool(model, example)
    try:
        after = _shapes(model, example)
    except Exception as error:  # what a network raises whose layers do not fit each other
        return row | {"outcome": "breaks", "why": told(error)}
    return row | {"outcome": "runs" if after == before else "other shapes"} | share_cut(model, wide, example)


def _shapes(model: nn.Module, example: Any) -> list[torch.Size]:
    with torch.no_grad():
        return [tensor.shape for tensor in tensors_in(run(model.eval(), Inputs.of(example)))]


def told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


TOOLS: dict[str, Callable[[nn.Module, Any], dict[str, Any]]] = {
    "ours": ours,
    "torch_pruning": torch_pruning,
    "torch_kirigami": torch_kirigami,
}


def row_of(package: str, name: str, others: dict[str, Any]) -> dict[str, Any]:
    """A network's row; what other tools did may be known."""
    try:
        model, example = build(package, name)
        row = {"params": count_params(model), "macs": counted(model, example)[""]}
    except Exception as error:
        return {"outcome": "does not run", "why": told(error)}
    known = {tool: others[tool] for tool in TOOLS if tool in others and tool != "ours"}
    return row | {tool: known.get(tool) or measured(tool, model, example) for tool in TOOLS}


def measured(tool: str, model: nn.Module, example: Any) -> dict[str, Any]:
    """What a tool says of a network, from a process of its own."""
    limit = OURS if tool == "ours" else LIMIT
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_measure, args=(there, limit, tool, model, example))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(WALL) else {"outcome": f"no answer in {WALL} s"}
    except EOFError:  # it has ended without a word
        process.join()
        late = process.exitcode == -signal.SIGPROF
        return {"outcome": f"no answer in {limit} s" if late else f"dies with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _measure(there: Connection, limit: float, tool: str, model: nn.Module, example: Any) -> None:
    signal.setitimer(signal.ITIMER_PROF, limit)  # the process dies of SIGPROF when its time is over
    try:
        row = ours(model, example) if tool == "ours" else of_other(TOOLS[tool], model.eval(), example)
    except Exception as error:
        row = {"outcome": "raises", "why": told(error)}
    there.send(row)


def versions(package: str) -> dict[str, str]:
    names = ("torch", "torch-pruning", "torch-kirigami", package.partition(".")[0].replace("_", "-"))
    return {name: version(name) for name in dict.fromkeys(names)}


def commit() -> str:
    """The commit that is measured, with a + where the package was changed since."""
    git = [
        subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROWS.parent, check=True).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", csgd.__path__[0]))
    ]
    return git[0] + ("+" if git[1] else "")


def row_in(path: Path | None, package: str, name: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    return next((row for row in rows if (row["package"], row["name"]) == (package, name)), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), help="networks of these packages, or of these names")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file that rows are added to")
    parser.add_argument("--others", type=Path, help="a file of rows from which those of the other tools are taken")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a process that is forked has no threads of torch's
    about = {"commit": commit(), "threads": torch.get_num_threads()}
    with (Path(tempfile.gettempdir()) / f"coverage{asked.rows.resolve()}.lock".replace("/", "-")).open("w") as lock:
        for place, (package, name) in enumerate(networks()):
            if asked.only and not {package, name} & {*asked.only}:
                continue
            try:  # byte `place` of the lock stands for the network, until this process ends
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                continue
            if row_in(asked.rows, package, name):
                continue
            about_it = {"package": package, "name": name} | about | {"versions": versions(package)}
            row = about_it | row_of(package, name, row_in(asked.others, package, name))
            with asked.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, row.get("outcome") or {tool: row[tool]["outcome"] for tool in TOOLS}, flush=True)


if __name__ == "__main__":
    main()

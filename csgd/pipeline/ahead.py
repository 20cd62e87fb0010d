"""What lies ahead of a run, known before its first step: widths, costs, forecast, memory and time."""

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csgd import report
from csgd.checkpoint import write_json
from csgd.clusters import Clusters, cluster
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph import ChannelSpace, Kind, conditions
from csgd.pipeline.base import weights_at_hand
from csgd.pipeline.build import device_name
from csgd.pipeline.clock import Clock
from csgd.pipeline.console import headline
from csgd.pipeline.phase import timetable_of
from csgd.pipeline.pull import Pull, tell_plan
from csgd.proof import Proof, prove
from csgd.train import criterion
from csgd.trial import find_spaces
from csgd.trim import cut
from csgd.verify import count_macs, count_params
from csgd.widths import target_widths

log = logging.getLogger("csgd")

LONG_ENOUGH = 0.5  # seconds of a step that are measured well


def plan_only(cfg: Any, model: nn.Module, data: Data, output_dir: Path) -> None:
    """Shows what a run would do, and writes it to plan.json; the model is spoilt."""
    spaces = spaces_of_run(model, data)
    stages = stages_of(cfg, spaces)
    ready = weights_at_hand(cfg, model)
    clusters = _clusters(cfg, model, spaces, stages[0], ready)
    planned_clusters = clusters or cluster(model, spaces, stages[0], "even")
    proof = proven(model, spaces, planned_clusters, data)
    pull = Pull.of(cfg, model, data, spaces, planned_clusters)
    before = {"macs": count_macs(model, data.example), "params": count_params(model)}
    after = costs_after(model, data, spaces, stages)
    clock = clock_of(cfg, data, pull, before["macs"], after)
    start = timetable_of(cfg, data, "base").steps if ready or cfg.base.weights else 0
    steps = clock.work(start, sum(steps for steps, _ in clock.parts))
    step_seconds, memory = _step(model, data, cfg.schedule, pull.optimizer)
    layers, ahead = described(spaces, stages[-1]), pull.ahead
    planned = {
        "layers": layers,
        "widths": stages,
        "clusters": {name: [len(part) for part in parts] for name, parts in clusters.items()},
        "cost": [before, *after],
        "proof": {"changes": proof.changes, "control": proof.control},
        "strengths": pull.strengths,
        "forecast": {
            "steps": pull.timetable.steps,
            "collapses": ahead.collapses,
            "collapse_step": ahead.collapse_step,
            "left": {name: abs(factors[-1]) for name, factors in ahead.factors.items()},
            "advice": ahead.advice,
        },
        "estimate": {
            "device": device_name(data.example.device),
            "seconds_per_step": step_seconds,
            "seconds": steps * step_seconds,
            "bytes": memory,
        },
    }
    write_json(output_dir / "plan.json", planned)
    header = ("", "at the start", *(f"after cut {number}" for number in range(1, len(stages) + 1)))
    names = (("macs", "multiply-accumulates"), ("params", "parameters"))
    rows = [(name, *(_share(cost[key], before[key]) for cost in planned["cost"])) for key, name in names]
    headline.info("layers\n\n%s\n", report.table(report.LAYER_HEADER, report.layer_rows(layers, clusters)))
    if not clusters:
        headline.info("clusters: found from the weights of the base network, which are not at hand")
    headline.info("cost\n\n%s\n", report.table(header, rows))
    tell_plan(pull)
    headline.info(
        "estimate on %s: %s for all steps (the first %.3g s each, without loading the images), %.1f GB of memory",
        planned["estimate"]["device"],
        report.duration(steps * step_seconds),
        step_seconds,
        memory / 1e9,
    )
    log.info("nothing was trained (plan_only=true); files: %s", output_dir)


def spaces_of_run(model: nn.Module, data: Data, trial: bool = True) -> list[ChannelSpace]:
    """The channel spaces of a run, which pulls by CSGD: those stay whole that this does not reach."""
    spaces = find_spaces(model, data.example, trial)
    out_of_reach = (
        (space.name, condition)
        for space in spaces
        for condition in space.conditions
        if condition.kind is Kind.ONLY_COLLAPSE
    )
    conditions.pin(spaces, {name: f"training does not change {condition.why}" for name, condition in out_of_reach})
    return spaces


def proven(model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters, data: Data) -> Proof:
    """The proof of a cut with these clusters, told in the log; InputError, before training, where it fails."""
    proof = prove(model, spaces, clusters, data.example)
    log.info("proof of the cut, on a twin: %s", proof)
    if proof.failing:
        failing = "; ".join(f"{name}: {reason}" for name, reason in proof.failing.items())
        keep = ", ".join(f"'{name}'" for name in proof.failing)
        raise InputError(f"these clusters cannot be cut exactly ({failing}); deps.keep=[{keep}] leaves them whole")
    return proof


def stages_of(cfg: Any, spaces: list[ChannelSpace]) -> list[dict[str, int]]:
    """The widths of each stage: those of deps, or the fractions of deps.stages of the widths at the start."""
    options = dict(min_width=cfg.deps.min_width, round_to=cfg.deps.round_to, keep=cfg.deps.keep)
    if cfg.deps.stages is not None:
        stages = []
        for fraction in cfg.deps.stages:
            stages.append(target_widths(spaces, fraction, after=stages[-1] if stages else None, **options))
    elif cfg.deps.widths is not None:
        stages = [target_widths(spaces, cfg.deps.widths, **options)]
    elif cfg.deps.layers:
        stages = [target_widths(spaces, cfg.deps.layers, rest=cfg.deps.fraction, **options)]
    else:
        stages = [target_widths(spaces, cfg.deps.fraction, **options)]
    if all(stages[0].get(space.name, space.size) == space.size for space in spaces):
        raise InputError("deps: nothing is left to trim, every layer keeps its width")
    return stages


def described(spaces: list[ChannelSpace], widths: dict[str, int]) -> list[dict[str, Any]]:
    """Every channel space with its width before and after, as plain JSON."""
    return [
        {
            "name": space.name,
            "before": space.size,
            "after": widths.get(space.name, space.size),
            "pinned": list(space.pinned),
        }
        for space in spaces
    ]


def tell_spaces(spaces: list[ChannelSpace], widths: dict[str, int]) -> None:
    log.info("%d channel spaces, %d of them can be trimmed", len(spaces), len(widths))
    for space in spaces:
        if space.pinned:
            log.info("  %s stays whole: %s", space.name, "; ".join(space.pinned))


def costs_after(
    model: nn.Module, data: Data, spaces: list[ChannelSpace], stages: list[dict[str, int]]
) -> list[dict[str, int]]:
    """MACs and parameters after the cut of each stage: which filters are in which cluster does not matter for them."""
    costs = []
    for widths in stages:
        twin = copy.deepcopy(model)
        cut(twin, spaces, cluster(twin, spaces, widths, "even"))
        costs.append({"macs": count_macs(twin, data.example), "params": count_params(twin)})
    return costs


def clock_of(cfg: Any, data: Data, pull: Pull, macs: int, after: list[dict[str, int]]) -> Clock:
    """The clock of a run whose stages are cut when the first one's forecast says."""
    end, before = pull.timetable.steps, macs
    cut = (pull.ahead.collapse_step if cfg.trim_at == "collapse" else None) or end
    parts = [(timetable_of(cfg, data, "base").steps, 1.0)]
    for cost in after:
        parts += [(cut, before / macs), (end - cut, cost["macs"] / macs)]
        before = cost["macs"]
    return Clock(parts)


def _clusters(cfg: Any, model: nn.Module, spaces: list[ChannelSpace], widths: dict[str, int], ready: bool) -> Clusters:
    """The clusters of the first stage, empty if they are k-means of weights that are not there yet."""
    if cfg.clustering.method == "kmeans" and not ready:
        return {}
    return cluster(model, spaces, widths, cfg.clustering.method, cfg.seed, cfg.clustering.of)


def _step(model: nn.Module, data: Data, schedule: Any, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Seconds and bytes of one step with the wide network, judged by few images where many would take long."""
    batch_size = schedule.batch_size
    images, own = data.example, {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        _timed_pass(model, images)
    optimizer.step()
    started = time.perf_counter()
    optimizer.step()
    update = time.perf_counter() - started
    while (seconds := _timed_pass(model, images)) < LONG_ENOUGH and len(images) < batch_size:
        images = images.repeat(2, 1, 1, 1)[:batch_size]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = sum(held.values()) * batch_size // (len(data.example) * schedule.accumulation)
    return seconds * batch_size / len(images) + update, 3 * weights + activations  # weights, gradients, momentum


def _timed_pass(model: nn.Module, images: Tensor) -> float:
    started = time.perf_counter()
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    loss = criterion(model.train()(images), labels)
    loss.backward()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started


def _share(cost: int, of: int) -> str:
    return f"{cost:,}" if cost == of else f"{cost:,} (−{1 - cost / of:.1%})"

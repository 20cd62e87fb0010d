"""plan_only: what a run would do, told and written to plan.json, without a step of training."""

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from csgd import report
from csgd.checkpoint import write_json
from csgd.clusters import Clusters, cluster
from csgd.folder import RunFolder
from csgd.graph.twin import tensors_in
from csgd.pipeline.base import weights_at_hand
from csgd.pipeline.console import headline
from csgd.pipeline.device import device_name
from csgd.pipeline.foresee import RunPlan, foresee, tell_forecast
from csgd.pipeline.learners import free_learner, pulled_learner
from csgd.pipeline.settle import settled
from csgd.pipeline.setup import Setup
from csgd.pipeline.stage import check_proof
from csgd.pipeline.ways import WAYS
from csgd.report import duration

log = logging.getLogger("csgd")

LONG_ENOUGH = 0.5  # seconds of a step that are measured well


def preview(setup: Setup, plan: RunPlan, folder: RunFolder) -> None:
    """Tells the plan and writes it to plan.json; the model is spoilt."""
    ready, way = weights_at_hand(setup), WAYS[setup.spec.cut.way]
    if not setup.settled and (ready or not way.trained):
        setup = settled(setup, folder)
        plan = foresee(setup)
    found = _clusters(setup, ready)
    clusters = found or cluster(setup.model, setup.spaces, setup.widths[0], "even")
    proof = check_proof(setup, setup.spaces, clusters) if way.proven else None
    learner = pulled_learner(setup, setup.spaces, clusters) if way.pulls else free_learner(setup)
    steps = plan.work(trains_base=way.trained and not (ready or setup.spec.base.weights))
    step_seconds, memory = _step(setup, learner.optimizer)
    forecast = plan.stage.forecast
    planned = {
        "layers": plan.layers(setup),
        "widths": setup.widths,
        "settled": setup.settled,
        "clusters": {name: [len(part) for part in parts] for name, parts in found.items()},
        "cost": [cost.whole() for cost in plan.costs],
        "proof": proof and {"changes": proof.changes, "control": proof.control},
        "strengths": plan.stage.strengths,
        "forecast": {
            "steps": plan.csgd_steps,
            "collapses": forecast.collapses,
            "collapse_step": forecast.collapse_step,
            "left": {name: abs(factors[-1]) for name, factors in forecast.factors.items()},
            "advice": forecast.advice,
        },
        "estimate": {
            "device": device_name(setup.data.example.device),
            "seconds_per_step": step_seconds,
            "seconds": steps * step_seconds,
            "bytes": memory,
        },
    }
    write_json(folder.plan, planned)
    _tell(planned, plan, found)
    log.info("nothing was trained (plan_only=true); files: %s", folder)


def _tell(planned: dict[str, Any], plan: RunPlan, clusters: Clusters) -> None:
    cuts, costs, estimate = range(1, len(plan.costs)), plan.costs, planned["estimate"]
    header = ("", "at the start", *(f"after cut {number}" for number in cuts))
    rows = [
        ("multiply-accumulates", *(_share(cost.macs, costs[0].macs) for cost in costs)),
        ("parameters", *(_share(cost.params, costs[0].params) for cost in costs)),
    ]
    layers = report.layer_rows(planned["layers"], clusters)
    headline.info("layers\n\n%s\n", report.table(report.LAYER_HEADER, layers))
    if not planned["settled"]:
        headline.info("widths: evenly by size; by sensitivity they need the base network, which is not at hand")
    if not clusters:
        headline.info("clusters: found from the weights of the base network, which are not at hand")
    headline.info("cost\n\n%s\n", report.table(header, rows))
    tell_forecast(plan.stage)
    headline.info(
        "estimate on %s: %s for all steps (the first %.3g s each, without loading the images), %.1f GB of memory",
        estimate["device"],
        duration(estimate["seconds"]),
        estimate["seconds_per_step"],
        estimate["bytes"] / 1e9,
    )


def _clusters(setup: Setup, ready: bool) -> Clusters:
    """The clusters of the first stage, empty if they are found from weights that are not there yet."""
    way = WAYS[setup.spec.cut.way]
    by_weights = way.trained and (not way.proven or setup.spec.clustering.method == "kmeans")
    return {} if by_weights and not ready else way.choose(setup, setup.spaces, setup.widths[0])


def _step(setup: Setup, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Seconds and bytes of one step with the wide network, judged by few images where many would take long."""
    model, batch_size, few = setup.model, setup.spec.batch_size, len(setup.data.example)
    images, own = setup.data.example, {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
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
        images = torch.cat([images, images])[:batch_size]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = sum(held.values()) * batch_size // (few * setup.spec.pull.train.accumulation)
    return seconds * batch_size / len(images) + update, 3 * weights + activations  # weights, gradients, momentum


def _timed_pass(model: nn.Module, images: Tensor) -> float:
    started = time.perf_counter()
    sum(outputs.float().mean() for outputs in tensors_in(model.train()(images))).backward()  # of any loss, all heads
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started


def _share(cost: int, of: int) -> str:
    return f"{cost:,}" if cost == of else f"{cost:,} (−{1 - cost / of:.1%})"

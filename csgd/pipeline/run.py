"""One run: its stages in order, and what it leaves behind."""

import json
import logging
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csgd import report
from csgd.checkpoint import save_weights, write_json
from csgd.clusters import cluster
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.pipeline.base import base_network
from csgd.pipeline.build import build, check_fit, commit, device_name, device_of, label, placed, versions
from csgd.pipeline.pull import Pull, check_strengths, cut, tell_plan, train_csgd, until_collapse
from csgd.tracking import Tracker
from csgd.train import accuracy, predict
from csgd.trial import find_spaces
from csgd.verify import Verdict, count_macs, count_params
from csgd.widths import target_widths

log = logging.getLogger("csgd")


def run(cfg: Any, output_dir: Path) -> Verdict:
    """Trains, prunes and judges as `cfg` (an object of the schema in conf/) says; leaves its files in `output_dir`."""
    seconds, started = {}, time.perf_counter()
    device = device_of(cfg)
    check_strengths(cfg)
    data = build("dataset", cfg.dataset, batch_size=cfg.schedule.batch_size, seed=cfg.seed, device=device)
    torch.manual_seed(cfg.seed)
    model = build("model", cfg.model, num_classes=data.num_classes, image_size=data.example.size(-1))
    model = placed(model, device)
    check_fit(model, data)
    name = f"{label(cfg.model)}-{label(cfg.dataset)}-{cfg.deps.fraction:g}-s{cfg.seed}"
    settings = dict(project=cfg.wandb.project, entity=cfg.wandb.entity, group=cfg.wandb.group, tags=cfg.wandb.tags)
    with Tracker(output_dir, mode=cfg.wandb.mode, config=asdict(cfg), settings=settings | {"name": name}) as tracker:
        with clocked(seconds, "cluster"):
            spaces = find_spaces(model, data.example)
            widths = _widths(cfg, spaces)
            _tell_spaces(spaces, widths)
            # The forecast needs no weights: what will not do is said before the base network is trained.
            tell_plan(Pull.of(cfg, model, data, spaces, cluster(model, spaces, widths, "even")))
        with clocked(seconds, "base"):
            base = base_network(cfg, model, data, tracker)
        with clocked(seconds, "cluster"):
            clusters = cluster(model, spaces, widths, cfg.clustering.method, cfg.seed)
        write_json(output_dir / "clusters.json", clusters)
        pull = Pull.of(cfg, model, data, spaces, clusters)
        with clocked(seconds, "csgd_wide"):
            cut_step = until_collapse(cfg, model, data, clusters, pull, tracker, output_dir)
        cost = {"macs_before": count_macs(model, data.example), "params_before": count_params(model)}
        with clocked(seconds, "trim"):
            judged = cut(cfg, model, data, spaces, clusters, pull.optimizer)
        cost |= {"macs_after": count_macs(model, data.example), "params_after": count_params(model)}
        with clocked(seconds, "csgd_trimmed"):
            rest = range(cut_step, pull.phase["steps"].stop)
            train_csgd(cfg, model, data, clusters, pull, tracker, output_dir, rest)
            judged = replace(judged, accuracy=accuracy(*predict(model, data)))
        seconds["csgd"] = seconds["csgd_wide"] + seconds["csgd_trimmed"]
        seconds["total"] = time.perf_counter() - started
        summary = {
            "base": base,
            "verdict": asdict(judged),
            "cost": cost,
            "seconds": seconds,
            "collapse": {
                "step": cut_step,
                "predicted_step": pull.ahead.collapse_step,
                "fraction": cut_step / pull.phase["steps"].stop,
            },
            "strengths": pull.strengths,
            "widths": widths,
            "seed": cfg.seed,
            "device": device_name(device),
            "commit": commit(),
            "versions": versions(),
            "config": asdict(cfg),
        }
        _leave(model, data, summary, output_dir)
        _report(summary, pull.curves(), tracker, output_dir)
    return judged


def _widths(cfg: Any, spaces: list[ChannelSpace]) -> dict[str, int]:
    deps, options = cfg.deps.fraction, {}
    if cfg.deps.widths is not None:
        deps = cfg.deps.widths
    elif cfg.deps.layers:
        deps, options = cfg.deps.layers, {"rest": cfg.deps.fraction}
    options |= dict(min_width=cfg.deps.min_width, round_to=cfg.deps.round_to, keep=cfg.deps.keep)
    widths = target_widths(spaces, deps, **options)
    if all(widths.get(space.name, space.size) == space.size for space in spaces):
        raise InputError("deps: nothing is left to trim, every layer keeps its width")
    return widths


def _tell_spaces(spaces: list[ChannelSpace], widths: dict[str, int]) -> None:
    log.info("%d channel spaces, %d of them can be trimmed", len(spaces), len(widths))
    for space in spaces:
        if space.pinned:
            log.info("  %s stays whole: %s", space.name, "; ".join(space.pinned))


def _leave(model: nn.Module, data: Data, summary: dict[str, Any], output_dir: Path) -> None:
    """The pruned network as safetensors and JSON, and the summary."""
    save_weights(output_dir / "pruned.safetensors", model.state_dict())
    described = {
        "model": summary["config"]["model"],
        "num_classes": data.num_classes,
        "image_size": data.example.size(-1),
        **{key: summary[key] for key in ("widths", "verdict", "cost", "versions", "commit")},
    }
    write_json(output_dir / "pruned.json", described)
    write_json(output_dir / "summary.json", summary)


def _report(summary: dict[str, Any], foreseen, tracker: Tracker, output_dir: Path) -> None:
    judged = summary["verdict"]
    tracker.summarise({f"{part}/{key}": value for part in ("verdict", "cost") for key, value in summary[part].items()})
    try:
        tracker.log_image("report/curves", report.draw_curves(output_dir, foreseen, summary["collapse"]["step"]))
    except Exception as error:  # a picture never loses a run
        log.warning("report/curves.png could not be drawn: %s", error)
    layers = report.table(("layer", "width before", "width after"), _layer_rows(output_dir, summary["widths"]))
    log.info("widths\n\n%s\n", layers)
    log.info("%s\n\n%s\n", "LOSSLESS" if judged["lossless"] else "NOT LOSSLESS", report.verdict_table(summary))
    if not judged["lossless"]:
        lost = judged["accuracy_before_trim"] - judged["accuracy_after_trim"]
        why = "the cut changed the logits" if judged["collapsed"] else "the filters have not collapsed"
        log.warning("NOT LOSSLESS: %s; the cut cost %.4f of accuracy", why, lost)
    log.info("files: %s", output_dir)
    if tracker.offline_dir:
        log.info(
            "W&B, offline: look with `wandb beta leet %s`, upload with `wandb sync %s`", *[tracker.offline_dir] * 2
        )


def _layer_rows(output_dir: Path, widths: dict[str, int]) -> list[tuple[str, int, int]]:
    clusters = json.loads((output_dir / "clusters.json").read_text())
    return [(name, sum(map(len, clusters[name])), width) for name, width in widths.items()]


@contextmanager
def clocked(seconds: dict[str, float], stage: str):
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started

"""What a run leaves: the pruned network, its summary, its card and its report."""

import json
import logging
import math
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csgd import ranks, report
from csgd.build import build
from csgd.checkpoint import write_json
from csgd.errors import line_of
from csgd.folder import RunFolder
from csgd.pipeline.by_layer import IMAGES, latencies, of_modules
from csgd.pipeline.console import headline
from csgd.pipeline.device import device_name, place
from csgd.pipeline.foresee import Cost, RunPlan, saving
from csgd.pipeline.progress import Part, Progress, StageResult
from csgd.pipeline.provenance import identity, refuse_other, versions
from csgd.pipeline.setup import Setup
from csgd.pipeline.ship import keep, ship
from csgd.pipeline.spec import RunSpec, plain
from csgd.pipeline.watch import warn_instead_of_raising
from csgd.pipeline.ways import WAYS
from csgd.tracking import Tracker
from csgd.verify import Verdict, worst

if TYPE_CHECKING:
    from conf.schema import Config

log = logging.getLogger("csgd")

PACES = {Part.WIDE: "wide", Part.NARROW: "trimmed"}  # in files


def leave(setup: Setup, plan: RunPlan, progress: Progress, tracker: Tracker, command: str | None) -> Verdict:
    """Writes what a finished run leaves, and returns its verdict: lossless if every cut was, the largest changes, the
    accuracies around the last."""
    judged = worst([result.verdict for result in progress.results])
    progress.tick()
    summary = _summary(setup, plan, progress, judged) | {"command": command}
    if ranks.is_first():
        summary["latency"] = _latency(setup)
        folder = progress.folder
        keep(setup, folder.path, **{key: summary[key] for key in ("widths", "verdict", "cost", "command")})
        write_json(folder.summary, summary)
        ship(setup, summary, folder)
        _report(summary, tracker, folder, setup.spec.draws_report)
    return judged


def finished(config: "Config", path: Path, key: str = "hydra.sweep.dir") -> Verdict | None:
    """The verdict of a run that has come to its end in the folder; InputError if it is of another configuration."""
    folder = RunFolder(path)
    if not folder.summary.exists():
        return None
    summary = folder.read_summary()
    then, now = (identity(*pair) for pair in ((summary["config"], summary["versions"]), (plain(config), versions())))
    refuse_other(key, path, then, now)
    return Verdict(**summary["verdict"])


def _summary(setup: Setup, plan: RunPlan, progress: Progress, judged: Verdict) -> dict[str, Any]:
    last = progress.results[-1]
    seconds, data, way = progress.seconds, setup.data, WAYS[setup.spec.cut.way]
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "data": {
            "train": data.train_size,
            setup.spec.tested_on.replace("-", "_"): data.test_size,
            "image": list(data.example.shape[1:]),
            "classes": data.num_classes,
            "class_names": list(data.class_names),
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "way": {"pulls": way.pulls, "trained": way.trained, "told": way.told},
        "base": asdict(progress.base),
        "cost": saving(plan.costs[0], Cost.of(setup.model, setup, last.widths)),
        "seconds": asdict(seconds) | {"csgd": seconds.csgd_wide + seconds.csgd_trimmed},
        "stages": [_stage(result) for result in progress.results],
        "ranks": ranks.own_share().ranks,
        "cut": _cut(last),
        "strengths": last.strengths,
        "widths": last.widths,
        "verdict": asdict(judged),
        "layers": plan.layers(setup),
        "seconds_per_step": {PACES[part]: pace.seconds_per_step for part, pace in progress.pace.items()},
        "seed": setup.spec.seed,
        "device": device_name(setup.data.example.device),
        "commit": setup.commit,
        "versions": versions(),
        "config": setup.spec.config,
        **({"task": setup.data.task} if setup.data.criterion or setup.data.score else {}),
        **({"tuned": _tuned(setup.spec)} if setup.spec.trials else {}),
    }


def _tuned(spec: RunSpec) -> dict[str, Any]:
    """The learning rate, and the trials that gave it; what did not come to its end has no score."""
    trials = [asdict(one) | {"score": None if math.isnan(one.score) else one.score} for one in spec.trials]
    return {"lr": spec.pull.rates.lr, "held_out": spec.config["tune"]["held_out"], "trials": trials}


def _stage(result: StageResult) -> dict[str, Any]:
    return {
        "widths": result.widths,
        "strengths": result.strengths,
        "cut": _cut(result),
        "verdict": asdict(result.verdict),
        "forecast": {"steps": result.steps, "curves": result.curves},
        "apart": {name: list(pair) for name, pair in result.apart.items()},
    }


def _latency(setup: Setup) -> dict[str, Any] | None:
    """Milliseconds of each space's layers and of the whole network, dense and pruned; None where a dense network cannot
    be built anew, as it was before the run: latency does not depend on the weights."""
    spec, data, example = setup.spec, setup.data, setup.data.example
    images, widths = example[[i % len(example) for i in range(IMAGES)]], setup.widths[-1]
    try:
        dense = build("model", spec.model, num_classes=data.num_classes, image_size=example.size(-1))
        models = {"dense": place(dense, example.device, spec.machine.precision), "pruned": setup.model}
        taken = latencies(models, images)
    except Exception as error:  # whatever a network of the user's raises when it is built anew
        log.warning("the latency of the layers could not be measured: %s", line_of(error))
        return None
    of_spaces = {
        name: of_modules(model, setup.spaces, widths if name == "pruned" else {}, taken[name])
        for name, model in models.items()
    }
    return {
        "images": IMAGES,
        "whole": [taken[name][""] for name in models],
        "layers": {space.name: [of_spaces[name][space.name] for name in models] for space in setup.spaces},
    }


def _cut(result: StageResult) -> dict[str, Any]:
    return {
        "step": result.cut_step,
        "foreseen_step": result.foreseen_step,
        "fraction": result.cut_step / result.steps,
    }


def _report(summary: dict[str, Any], tracker: Tracker, folder: RunFolder, draws: bool) -> None:
    judged = summary["verdict"]
    tracker.summarise({f"{part}/{key}": value for part in ("verdict", "cost") for key, value in summary[part].items()})
    rows = report.layer_rows(summary["layers"], json.loads(folder.clusters.read_text("utf-8")))
    tracker.log_table("report/layers", report.LAYER_HEADER, rows)
    if draws:
        _draw(tracker, folder)
    log.info("layers\n\n%s\n", report.table(report.LAYER_HEADER, rows))
    way = summary["way"]
    told = "LOSSLESS" if judged["lossless"] else "NOT LOSSLESS" if way["pulls"] else way["told"].upper()
    headline.info("%s\n\n%s\n", told, report.verdict_table(summary))
    if way["pulls"] and not judged["lossless"]:
        lost = judged["accuracy_before_trim"] - judged["accuracy_after_trim"]
        why = "the cut changed the outputs"
        if not judged["collapsed"]:
            why = f"the filters have not collapsed, or what follows them ({judged['relative_deviation']:.1e} is left)"
        log.warning("NOT LOSSLESS: %s; the cut cost %.4f of %s", why, lost, report.task_of(summary)["score"])
    log.info("files: %s", folder)
    if draws:
        log.info("report: %s", folder.page)
    if offline := tracker.offline_dir:
        log.info("W&B, offline: look with `wandb beta leet %s`, upload with `wandb sync %s`", offline, offline)


def _draw(tracker: Tracker, folder: RunFolder) -> None:
    """The pictures and the page."""
    started = time.perf_counter()
    with warn_instead_of_raising("report/collapse.gif"):
        report.draw_collapse(folder.path)
    pictures = (report.draw_curves, report.draw_outputs, report.draw_spaces, report.draw_filters, report.draw_widths)
    for draw in (*pictures, report.draw_sensitivity, report.draw_sizes):
        with warn_instead_of_raising(f"report/{draw.__name__.removeprefix('draw_')}.png"):
            if path := draw(folder.path):
                tracker.log_image(f"report/{path.stem}", path)
    with warn_instead_of_raising("report.html"):
        report.write_page(folder.path)
    log.info("report: drawn in %.1f s", time.perf_counter() - started)

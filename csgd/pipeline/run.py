"""One run: its stages in order, and what it leaves behind."""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from csgd import ranks, report
from csgd.build import build, label
from csgd.checkpoint import write_json
from csgd.clusters import cluster
from csgd.data import Data
from csgd.errors import InputError, line_of
from csgd.export import check_packages
from csgd.pipeline.ahead import (
    clock_of,
    costs_after,
    described,
    plan_only,
    proven,
    spaces_of_run,
    stages_of,
    tell_spaces,
)
from csgd.pipeline.album import Album
from csgd.pipeline.base import base_network
from csgd.pipeline.build import (
    as_trained,
    average_of,
    check_fit,
    commit,
    device_name,
    device_of,
    placed,
    scaler_of,
    versions,
)
from csgd.pipeline.clock import Clock, bar_of
from csgd.pipeline.console import console, headline
from csgd.pipeline.journal import Journal, reserved
from csgd.pipeline.launch import check_ranks, joined, launch, started_first
from csgd.pipeline.phase import check_batches
from csgd.pipeline.pull import Pull, Stage, check_strengths, cut, tell_plan
from csgd.pipeline.ship import ship
from csgd.pruned import save_pruned
from csgd.reload import load_trimmed
from csgd.seeds import seed_all
from csgd.tracking import Tracker
from csgd.train import Learner, Sums, accuracy, predict
from csgd.verify import Verdict, count_macs, count_params, worst

log = logging.getLogger("csgd")

FORECAST_POINTS = 400  # per stage and group, for the picture


def run(
    cfg: Any, output_dir: Path, command: str | None = None, *, logs: Mapping[str, Any] | None = None
) -> Verdict | None:
    """Trains, prunes and judges as `cfg` (an object of the schema in conf/) says; leaves its files in `output_dir`.

    With cfg.plan_only it writes down what that would be, and there is no verdict.  With cfg.distributed.nproc it starts
    ranks, the first of which configures its logging as `logs` says; only that one writes.
    """
    check_ranks(cfg)
    with reserved(output_dir) if started_first() else nullcontext():
        if cfg.distributed.nproc > 1 and not cfg.plan_only:
            return launch(_one_rank, (cfg, output_dir, command), cfg.distributed.nproc, logs)
        return _one_rank(cfg, output_dir, command)


def _one_rank(cfg: Any, output_dir: Path, command: str | None) -> Verdict | None:
    with joined(cfg), console(cfg.quiet):
        return _run(cfg, output_dir, command)


def _run(cfg: Any, output_dir: Path, command: str | None) -> Verdict | None:
    started = time.perf_counter()
    device = device_of(cfg)
    if cfg.export:
        check_packages(cfg.export)
    check_strengths(cfg)
    offered = dict(batch_size=cfg.schedule.batch_size, seed=cfg.seed, device=device, share=ranks.own_share())
    seed_all(cfg.seed)  # a dataset of the user's may draw its split
    data = build("dataset", cfg.dataset, **offered, needed=["share"] if offered["share"].ranks > 1 else [])
    if not isinstance(data, Data):
        raise InputError(f"dataset._target_ must make a csgd.data.Data, got {type(data).__name__}")
    seed_all(cfg.seed)
    model = build("model", cfg.model, num_classes=data.num_classes, image_size=data.example.size(-1))
    model = placed(model, device, cfg.precision)
    check_fit(model, data)
    check_batches(cfg, model, data)
    if cfg.plan_only:
        return plan_only(cfg, model, data, output_dir) if ranks.is_first() else None
    if cfg.distributed.sync_bn and ranks.own_share().ranks > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    journal, origin = Journal.of(cfg, output_dir), commit()
    record, seconds = journal.record, journal.record["seconds"]
    before = seconds.get("total", 0.0)
    name = f"{label(cfg.model)}-{label(cfg.dataset)}-{cfg.deps.fraction:g}-s{cfg.seed}"
    settings = dict(project=cfg.wandb.project, entity=cfg.wandb.entity, group=cfg.wandb.group, tags=cfg.wandb.tags)
    with Tracker(
        output_dir if ranks.is_first() else None,
        mode=cfg.wandb.mode,
        config=asdict(cfg),
        settings=settings | {"name": name},
        rows=journal.saved["rows"] if journal.saved else 0,
    ) as tracker:
        if ranks.is_first():  # the folder is this run's from here on
            (output_dir / "failed.txt").unlink(missing_ok=True)
        with clocked(seconds, "cluster"):
            spaces = spaces_of_run(model, data)
            stages = stages_of(cfg, spaces)
            tell_spaces(spaces, stages[-1])
            # The forecast needs no weights: what will not do is said before the base network is trained.
            pull = Pull.of(cfg, model, data, spaces, cluster(model, spaces, stages[0], "even"))
            tell_plan(pull)
            clock = clock_of(cfg, data, pull, count_macs(model, data.example), costs_after(model, data, spaces, stages))
        if "base" not in record:
            with clocked(seconds, "base"):
                record["base"] = base_network(cfg, model, data, journal, tracker, clock)
            record["cost"] = _cost(model, data, "before")
        if saved := journal.take("between"):
            load_trimmed(model, saved["model"])
        trial = any(ref.role == "size" for space in spaces for ref in space.refs)  # it finds integers that follow
        for number in range(len(record.setdefault("stages", [])), len(stages)):
            _stage(cfg, model, data, trial, number, stages[number], journal, tracker, clock, output_dir)
            seconds["total"] = before + time.perf_counter() - started
            journal.save("between", 0, {"model": model.state_dict()}, Sums(), tracker)
        record["cost"] |= _cost(model, data, "after")
        seconds["csgd"] = seconds["csgd_wide"] + seconds["csgd_trimmed"]
        seconds["total"] = before + time.perf_counter() - started
        judged = _together(record["stages"])
        summary = {
            **{key: record[key] for key in ("base", "cost", "seconds", "stages")},
            "ranks": ranks.own_share().ranks,
            **{key: record["stages"][-1][key] for key in ("collapse", "strengths", "widths")},
            "verdict": asdict(judged),
            "layers": described(spaces, stages[-1]),
            "seconds_per_step": {phase: seconds / steps for phase, (seconds, steps) in record["pace"].items()},
            "command": command,
            "seed": cfg.seed,
            "device": device_name(device),
            "commit": origin,
            "versions": versions(),
            "config": asdict(cfg),
        }
        if ranks.is_first():
            _leave(model, data, summary, output_dir)
            ship(cfg, data, summary, {space.name: space.size for space in spaces}, output_dir)
            _report(summary, tracker, output_dir)
    return judged


def _stage(
    cfg: Any,
    model: nn.Module,
    data: Data,
    trial: bool,
    number: int,
    widths: dict[str, int],
    journal: Journal,
    tracker: Tracker,
    clock: Clock,
    output_dir: Path,
) -> None:
    """Clusters, trains to the collapse, cuts, and trains on; starts in the middle of that where the journal says so."""
    seconds, saved = journal.record["seconds"], journal.take("wide", "trimmed")
    if saved:
        load_trimmed(model, saved["model"])
    spaces = spaces_of_run(model, data, trial)  # mostly without: that was made on the network before its cuts
    if saved:
        clusters, pull = saved["clusters"], Pull.resumed(cfg, model, data, saved)
    else:
        with clocked(seconds, "cluster"):
            how = cfg.clustering.method, cfg.seed, cfg.clustering.of
            clusters = ranks.from_first(cluster(model, spaces, widths, *how) if ranks.is_first() else None)
            proven(model, spaces, clusters, data)
        pull = Pull.of(cfg, model, data, spaces, clusters)
        journal.record["pace"] = {}
    scaler, average = scaler_of(cfg, data.example.device), average_of(cfg, model)
    learner, done, sums = Learner(model, pull.optimizer, as_trained(cfg, model), scaler, average), 0, Sums()
    if saved:
        learner.load_state_dict(saved)
        done, sums = saved["step"], saved["sums"]
    album, wide = None, not saved or saved["phase"] == "wide"
    if ranks.is_first():
        write_json(output_dir / "clusters.json", clusters)
    if wide and ranks.is_first():
        with spared("the filters for their picture"):
            album = Album.of(output_dir / "filters.safetensors", number, model, spaces, clusters)
    if not saved:
        _keep(album, model, "start")
    end = pull.timetable.steps
    with bar_of(cfg, "C-SGD", range(done, end)) as bar:
        stage = Stage(cfg, data, spaces, clusters, pull, learner, number, journal, tracker, clock, bar, done, sums)
        if wide:
            with clocked(seconds, "csgd_wide"):
                stage.train_wide()
            with clocked(seconds, "trim"):
                _keep(album, model, "collapse")
                judged = cut(cfg, model, data, spaces, clusters, pull.optimizer, average)
                _keep(album, model, "cut")
            bar.set_description(f"C-SGD, cut at {stage.step}", refresh=False)
            journal.record["stage"] = {"cut_step": stage.step, "verdict": asdict(judged)}
            stage.save("trimmed")
            learner.network = as_trained(cfg, model)
        with clocked(seconds, "csgd_trimmed"):
            stage.train_narrow()
    if average:
        model.load_state_dict(average.module.state_dict())
    record = journal.record.pop("stage")
    journal.record["stages"].append(
        {
            "widths": widths,
            "strengths": pull.strengths,
            "collapse": {
                "step": record["cut_step"],
                "predicted_step": pull.ahead.collapse_step,
                "fraction": record["cut_step"] / end,
            },
            "verdict": record["verdict"] | {"accuracy": accuracy(*predict(model, data))},
            "forecast": {"steps": end, "curves": pull.curves(FORECAST_POINTS)},
        }
    )


def _keep(album: Album | None, model: nn.Module, when: str) -> None:
    with spared("the filters for their picture"):
        if album is not None:
            album.keep(model, when)


def _together(stages: list[dict[str, Any]]) -> Verdict:
    """One verdict of all cuts: lossless if every one was, the largest changes, the accuracies around the last."""
    return worst([Verdict(**stage["verdict"]) for stage in stages])


def _cost(model: nn.Module, data: Data, when: str) -> dict[str, int]:
    return {f"macs_{when}": count_macs(model, data.example), f"params_{when}": count_params(model)}


def _leave(model: nn.Module, data: Data, summary: dict[str, Any], output_dir: Path) -> None:
    """The pruned network as safetensors and JSON, and the summary."""
    facts = {key: summary[key] for key in ("widths", "verdict", "cost", "command", "seed", "versions", "commit")}
    facts["dataset"] = summary["config"]["dataset"]
    save_pruned(output_dir, model, summary["config"]["model"], data.example, data.num_classes, **facts)
    write_json(output_dir / "summary.json", summary)


def _report(summary: dict[str, Any], tracker: Tracker, output_dir: Path) -> None:
    judged = summary["verdict"]
    tracker.summarise({f"{part}/{key}": value for part in ("verdict", "cost") for key, value in summary[part].items()})
    rows = report.layer_rows(summary["layers"], json.loads((output_dir / "clusters.json").read_text()))
    tracker.log_table("report/layers", report.LAYER_HEADER, rows)
    started = time.perf_counter()
    for draw in (report.draw_curves, report.draw_filters, report.draw_widths, report.draw_sizes):
        with spared(f"report/{draw.__name__.removeprefix('draw_')}.png"):
            if path := draw(output_dir):
                tracker.log_image(f"report/{path.stem}", path)
    with spared("report.html"):
        report.write_page(output_dir)
    log.info("report: drawn in %.1f s", time.perf_counter() - started)
    log.info("layers\n\n%s\n", report.table(report.LAYER_HEADER, rows))
    headline.info("%s\n\n%s\n", "LOSSLESS" if judged["lossless"] else "NOT LOSSLESS", report.verdict_table(summary))
    if not judged["lossless"]:
        lost = judged["accuracy_before_trim"] - judged["accuracy_after_trim"]
        why = "the cut changed the logits"
        if not judged["collapsed"]:
            why = f"the filters have not collapsed, or what follows them ({judged['relative_deviation']:.1e} is left)"
        log.warning("NOT LOSSLESS: %s; the cut cost %.4f of accuracy", why, lost)
    log.info("files: %s", output_dir)
    if folder := tracker.offline_dir:
        log.info("W&B, offline: look with `wandb beta leet %s`, upload with `wandb sync %s`", folder, folder)


@contextmanager
def spared(what: str):
    """Reports what fails on the way to a picture: it never loses a run."""
    try:
        yield
    except Exception as error:
        log.warning("%s could not be drawn: %s", what, line_of(error))


@contextmanager
def clocked(seconds: dict[str, float], stage: str):
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started

"""What the two trainings of a run share: their schedule, and what is said of each epoch."""

import logging
from typing import Any

import torch
from torch import nn

from csgd.data import Data
from csgd.errors import InputError
from csgd.graph.twin import keep_random_state, twin_of
from csgd.pipeline.build import PRECISIONS
from csgd.pipeline.launch import rank_count
from csgd.report import duration
from csgd.schedule import Timetable, learning_rate, ramp
from csgd.tracking import Tracker
from csgd.train import Moment, Sums, TrainSpec

log = logging.getLogger("csgd")


def timetable_of(cfg: Any, data: Data, name: str) -> Timetable:
    """The steps of schedule.base, or those of schedule.csgd with the ramp of its pull."""
    phase = getattr(cfg.schedule, name)
    per_epoch = min(data.steps_per_epoch, phase.max_steps or data.steps_per_epoch)
    steps = range(phase.epochs * per_epoch)
    keys = ("epochs", "lr", "warmup_epochs", "decay", "milestones", "gamma")
    how = {key: getattr(phase, key) for key in keys}
    rates, ramps = [learning_rate(step, steps_per_epoch=per_epoch, **how) for step in steps], None
    if name == "csgd":
        ramps = [ramp(step, length=round(cfg.collapse_by * len(steps)), shape=cfg.ramp) for step in steps]
    return Timetable(per_epoch, rates, ramps)


def train_spec(cfg: Any, name: str) -> TrainSpec:
    """How a batch is taken in schedule.base or schedule.csgd."""
    return TrainSpec(
        seed=cfg.seed,
        clip_norm=getattr(cfg.schedule, name).clip_norm,
        label_smoothing=cfg.schedule.label_smoothing,
        accumulation=cfg.schedule.accumulation,
        precision=PRECISIONS[cfg.precision],
        compare_ranks_every=cfg.distributed.check_every,
    )


def check_batches(cfg: Any, model: nn.Module, data: Data) -> None:
    """InputError if the smallest batch of a run leaves a rank with less than the two images that batch norm needs, or
    is a single image on which this network cannot be trained."""
    size, count = cfg.schedule.batch_size, rank_count(cfg)
    left = data.train_size % size
    longest = max(timetable_of(cfg, data, name).steps_per_epoch for name in ("base", "csgd"))
    smallest = left if left and longest * size > data.train_size else size
    leaves = f"schedule.batch_size={size} leaves a last batch of {smallest} of the {data.train_size} images, "
    if count > 1 and smallest < 2 * count:
        raise InputError(f"{leaves}{count} ranks need at least {2 * count}")
    if smallest > 1:
        return
    with torch.no_grad(), keep_random_state(model):
        try:
            twin_of(model).train()(data.example[:1])
        except Exception as error:  # whatever a network raises on a single image
            raise InputError(f"{leaves}on which this network cannot be trained: {error}") from None


def log_epoch(
    phase: str, moment: Moment, sums: Sums, test_accuracy: float, tracker: Tracker, row: dict[str, Any], left: float
) -> None:
    values = {
        "loss": sums.mean_loss,
        "train_accuracy": sums.accuracy,
        "test_accuracy": test_accuracy,
        "lr": moment.lr,
        "seconds": sums.seconds,
        "seconds_per_step": sums.seconds_per_step,
    }
    tracker.log({"phase": phase, "step": moment.step} | {f"{phase}/{k}": v for k, v in values.items()} | row)
    deviations = "".join(
        f", deviation of {k.split('/')[1]} {v:.1e}" for k, v in row.items() if k.startswith("deviation/")
    )
    log.info(
        "%s epoch %d: loss %.4f, test accuracy %.4f, lr %.2g%s, %.1f s (%.3g ms a step), %s to go",
        phase,
        moment.epoch,
        sums.mean_loss,
        test_accuracy,
        moment.lr,
        deviations,
        sums.seconds,
        1000 * sums.seconds_per_step,
        duration(left),
    )

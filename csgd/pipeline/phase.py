"""What the two trainings of a run share: their schedule, and what is said of each epoch."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from csgd.data import Data
from csgd.errors import InputError
from csgd.graph.twin import keep_random_state, twin_of
from csgd.pipeline.build import PRECISIONS
from csgd.pipeline.launch import rank_count
from csgd.report import duration
from csgd.schedule import learning_rate, ramp
from csgd.tracking import Tracker
from csgd.train import Epoch

log = logging.getLogger("csgd")


def phase_of(cfg: Any, data: Data, name: str) -> dict[str, Any]:
    """The arguments of `train` for schedule.base or schedule.csgd; the ramp is for the pull of the latter."""
    phase = getattr(cfg.schedule, name)
    steps_per_epoch = min(data.steps_per_epoch, phase.max_steps or data.steps_per_epoch)
    return dict(
        steps=range(phase.epochs * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        clip_norm=phase.clip_norm,
        label_smoothing=cfg.schedule.label_smoothing,
        accumulation=cfg.schedule.accumulation,
        precision=PRECISIONS[cfg.precision],
        check_every=cfg.distributed.check_every,
        lr_at=partial(_lr_at(phase), steps_per_epoch=steps_per_epoch),
        ramp_at=partial(ramp, length=round(cfg.collapse_by * phase.epochs * steps_per_epoch), shape=cfg.ramp),
        seed=cfg.seed,
    )


def check_batches(cfg: Any, model: nn.Module, data: Data) -> None:
    """InputError if the smallest batch of a run leaves a rank with less than the two images that batch norm needs, or
    is a single image on which this network cannot be trained."""
    size, count = cfg.schedule.batch_size, rank_count(cfg)
    left = data.train_size % size
    longest = max(phase_of(cfg, data, name)["steps_per_epoch"] for name in ("base", "csgd"))
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


def chunks(steps: range, every: int | None) -> list[range]:
    """`steps` in parts that end at multiples of `every`."""
    if every is None:
        return [steps]
    stops = [*range((steps.start // every + 1) * every, steps.stop, every), steps.stop]
    return [range(start, stop) for start, stop in pairwise([steps.start, *stops])]


def _lr_at(phase: Any) -> Callable[..., float]:
    return partial(
        learning_rate,
        epochs=phase.epochs,
        lr=phase.lr,
        warmup_epochs=phase.warmup_epochs,
        decay=phase.decay,
        milestones=phase.milestones,
        gamma=phase.gamma,
    )


def log_epoch(
    phase: str, epoch: Epoch, test_accuracy: float, tracker: Tracker, row: dict[str, Any], seconds_left: float
) -> None:
    values = {
        "loss": epoch.loss,
        "train_accuracy": epoch.train_accuracy,
        "test_accuracy": test_accuracy,
        "lr": epoch.lr,
        "seconds": epoch.seconds,
        "seconds_per_step": epoch.seconds_per_step,
    }
    tracker.log({"phase": phase, "step": epoch.step} | {f"{phase}/{k}": v for k, v in values.items()} | row)
    deviations = "".join(
        f", deviation of {k.split('/')[1]} {v:.1e}" for k, v in row.items() if k.startswith("deviation/")
    )
    log.info(
        "%s epoch %d: loss %.4f, test accuracy %.4f, lr %.2g%s, %.1f s (%.3g ms a step), %s to go",
        phase,
        epoch.epoch,
        epoch.loss,
        test_accuracy,
        epoch.lr,
        deviations,
        epoch.seconds,
        1000 * epoch.seconds_per_step,
        duration(seconds_left),
    )

"""What the two trainings of a run share: their schedule, and what is said of each epoch."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from csgd.data import Data
from csgd.pipeline.build import PRECISIONS
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

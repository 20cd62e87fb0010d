"""The C-SGD phase: forecast, training until the collapse, the cut, and the rest of the run."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csgd.checkpoint import save_checkpoint
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.optim import CSGD, check_stability, param_groups
from csgd.pipeline.phase import log_epoch, phase_of
from csgd.plan import Plan, Timetable, plan, strengths_by
from csgd.tracking import Tracker
from csgd.train import accuracy, predict, train
from csgd.trim import statistics_momentum, trim
from csgd.verify import Verdict, statistics_spread, verdict

log = logging.getLogger("csgd")

LOOK_EVERY = 10  # steps between two looks at the deviation, once the collapse is due


def check_strengths(cfg: Any) -> None:
    """F6, before anything is built: the strengths under the highest learning rate of the schedule."""
    if cfg.centri_strength == "auto":
        return
    schedule = cfg.schedule
    inertia = (schedule.momentum, schedule.nesterov)
    check_stability(schedule.csgd.lr, cfg.centri_strength, schedule.weight_decay, *inertia)
    vectors = schedule.csgd.lr * max(1.0, schedule.bias_lr_factor), cfg.vector_ratio * cfg.centri_strength
    check_stability(*vectors, schedule.weight_decay_vectors, *inertia)


@dataclass(frozen=True)
class Pull:
    """What the C-SGD phase is made of: its optimizer, its schedule, and what that will do to the deviation."""

    optimizer: CSGD
    phase: dict[str, Any]
    ahead: Plan
    strengths: dict[str, float]  # ε of each group
    start: dict[str, float]  # deviation of each group before the first step

    @classmethod
    def of(cls, cfg: Any, model: nn.Module, data: Data, spaces: list[ChannelSpace], clusters) -> "Pull":
        schedule, phase = cfg.schedule, phase_of(cfg, data, "csgd")
        rates, ramps = ([phase[at](step) for step in phase["steps"]] for at in ("lr_at", "ramp_at"))
        timetable = Timetable(rates, ramps, cfg.tolerance.deviation, statistics_momentum(model))

        def optimizer(strength: float, ratio: float) -> CSGD:
            groups = param_groups(
                model,
                spaces,
                clusters,
                centri_strength=strength,
                vector_ratio=ratio,
                weight_decay=schedule.weight_decay,
                weight_decay_vectors=schedule.weight_decay_vectors,
                bias_lr_factor=schedule.bias_lr_factor,
            )
            return CSGD(groups, schedule.csgd.lr, schedule.momentum, schedule.nesterov)

        if cfg.centri_strength == "auto":
            within = round(cfg.collapse_by * len(rates))
            solved = strengths_by(optimizer(0.0, 0.0), timetable, within)
            if None in solved.values():
                raise InputError(
                    f"centri_strength=auto: no stable strength collapses the filters within {within} of {len(rates)} "
                    f"steps; a larger collapse_by than {cfg.collapse_by:g}, more epochs or a higher learning rate would"
                )
            strength = solved.pop("kernels")
            made = optimizer(strength, max(solved.values(), default=strength) / strength)
        else:
            made = optimizer(cfg.centri_strength, cfg.vector_ratio)
        groups = made.clustered_groups()
        strengths = {group["name"]: group["centri_strength"] for group in groups}
        return cls(made, phase, plan(made, timetable), strengths, {g["name"]: float(made.deviation(g)) for g in groups})

    def foreseen(self, name: str, step: int) -> float:
        """The forecast deviation of a group after `step` steps."""
        return self.start[name] * self.ahead.factors[name][step - 1] ** 2

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        return {
            name: [(step + 1, self.foreseen(name, step + 1)) for step in self.phase["steps"]] for name in self.start
        }


def tell_plan(pull: Pull) -> None:
    ahead = pull.ahead
    strengths = ", ".join(f"{value:.4g} on {name}" for name, value in pull.strengths.items())
    log.info("centripetal strength: %s", strengths)
    log.info("%s", ahead.describe())
    if not ahead.collapses:
        log.warning(
            "the filters will not collapse: %.1e of their deviation is left at the end, the cut needs %.0e and will "
            "not be lossless; %s would do",
            ahead.left,
            ahead.tolerance,
            ahead.advice,
        )


def until_collapse(cfg: Any, model: nn.Module, data: Data, clusters, pull: Pull, tracker, output_dir: Path) -> int:
    """Trains the wide network up to the step at which it is to be cut, and returns that step."""
    end = pull.phase["steps"].stop
    foreseen = pull.ahead.collapse_step if cfg.trim_at == "collapse" else None
    done = foreseen or end
    train_csgd(cfg, model, data, clusters, pull, tracker, output_dir, range(done))
    while foreseen and done < end and pull.optimizer.relative_deviation() > cfg.tolerance.deviation:
        more = range(done, min(done + LOOK_EVERY, end))  # float32 was slower than the forecast
        train_csgd(cfg, model, data, clusters, pull, tracker, output_dir, more)
        done = more.stop
    return done


def train_csgd(cfg, model, data, clusters, pull: Pull, tracker: Tracker, output_dir: Path, steps: range) -> None:
    """Some steps of the C-SGD phase, wide or trimmed; a row of metrics and a checkpoint after each epoch of them."""
    optimizer = pull.optimizer
    for epoch in train(model, optimizer, data, **pull.phase | {"steps": steps, "random_state": torch.get_rng_state()}):
        row = {"epoch": cfg.schedule.base.epochs + epoch.step / pull.phase["steps_per_epoch"]}
        for group in optimizer.clustered_groups():
            row[f"deviation/{group['name']}"] = float(optimizer.deviation(group))
            row[f"forecast/{group['name']}"] = pull.foreseen(group["name"], epoch.step)
        log_epoch("csgd", epoch, accuracy(*predict(model, data)), tracker, row)
        state = {"epoch": epoch.epoch, "step": epoch.step, "model": model.state_dict(), "clusters": clusters}
        save_checkpoint(output_dir / "checkpoints" / "last.pt", state | {"optimizer": optimizer.state_dict()})


def cut(cfg: Any, model: nn.Module, data: Data, spaces, clusters, optimizer: CSGD) -> Verdict:
    """Trims the model and the optimizer in place, and measures what that did to the logits."""
    before, labels = predict(model, data)
    measured = dict(
        deviation=float(optimizer.deviation()),
        relative_deviation=optimizer.relative_deviation(),
        statistics_spread=statistics_spread(model, spaces, clusters),
    )
    trim(model, spaces, clusters, optimizer)
    after, _ = predict(model, data)
    tolerances = dict(deviation_tolerance=cfg.tolerance.deviation, logit_tolerance=cfg.tolerance.logits)
    return verdict(before, after, labels, **measured, **tolerances)

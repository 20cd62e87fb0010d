"""The C-SGD phase: forecast, training until the collapse, the cut, and the rest of the run."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from csgd.clusters import Clusters
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.optim import CSGD, check_stability, param_groups
from csgd.pipeline.clock import Clock
from csgd.pipeline.journal import Journal
from csgd.pipeline.phase import log_epoch, timetable_of, train_spec
from csgd.plan import Collapsed, Plan, plan, strengths_by
from csgd.schedule import Timetable
from csgd.tracking import Tracker
from csgd.train import Learner, Moment, Sums, accuracy, predict, train
from csgd.trim import merge_equal, statistics_momentum, trim
from csgd.verify import Verdict, deviation, statistics_spread, verdict, worst, worst_deviation

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
    """What the C-SGD phase is made of: its optimizer, its schedule, and what that will do to the deviation.

    start  deviation of each clustered group before the first step
    """

    optimizer: CSGD
    timetable: Timetable
    ahead: Plan
    start: dict[str, float]

    @classmethod
    def of(cls, cfg: Any, model: nn.Module, data: Data, spaces: list[ChannelSpace], clusters: Clusters) -> "Pull":
        timetable, collapsed = timetable_of(cfg, data, "csgd"), _collapsed(cfg, model)

        def optimizer(strength: float, ratio: float) -> CSGD:
            groups = param_groups(
                model,
                spaces,
                clusters,
                centri_strength=strength,
                vector_ratio=ratio,
                weight_decay=cfg.schedule.weight_decay,
                weight_decay_vectors=cfg.schedule.weight_decay_vectors,
                bias_lr_factor=cfg.schedule.bias_lr_factor,
            )
            return CSGD(groups, cfg.schedule.csgd.lr, cfg.schedule.momentum, cfg.schedule.nesterov)

        if cfg.centri_strength == "auto":
            made, steps = optimizer(0.0, 0.0), timetable.steps
            within = round(cfg.collapse_by * steps)
            solved = strengths_by(made.clustered_groups(), timetable, collapsed, within)
            if None in solved.values():
                raise InputError(
                    f"centri_strength=auto: no stable strength collapses the filters within {within} of {steps} "
                    f"steps; a larger collapse_by than {cfg.collapse_by:g}, more epochs or a higher learning rate would"
                )
            for group in made.clustered_groups():
                group["centri_strength"] = solved[group["name"]]
        else:
            made = optimizer(cfg.centri_strength, cfg.vector_ratio)
        start = {group["name"]: float(made.deviation(group)) for group in made.clustered_groups()}
        return cls(made, timetable, plan(made.clustered_groups(), timetable, collapsed), start)

    @classmethod
    def resumed(cls, cfg: Any, model: nn.Module, data: Data, saved: dict[str, Any]) -> "Pull":
        """The phase as a checkpoint left it, before its cut or after it."""
        timetable = timetable_of(cfg, data, "csgd")
        named = dict(model.named_parameters())
        optimizer = CSGD([{"params": [named[name] for name in names]} for names in saved["groups"]], lr=0.0)
        optimizer.load_state_dict(saved["optimizer"])
        clustered = [group for group in optimizer.param_groups if group["name"] in saved["start"]]
        return cls(optimizer, timetable, plan(clustered, timetable, _collapsed(cfg, model)), saved["start"])

    @property
    def strengths(self) -> dict[str, float]:
        """ε of each clustered group."""
        return {g["name"]: g["centri_strength"] for g in self.optimizer.param_groups if g["name"] in self.start}

    def foreseen(self, name: str, step: int) -> float:
        """The forecast deviation of a group after `step` steps."""
        return self.start[name] * self.ahead.factors[name][step - 1] ** 2

    def curves(self, points: int) -> dict[str, list[tuple[int, float]]]:
        """The forecast deviation of each group as (step, deviation), at about so many steps."""
        steps = self.timetable.steps
        shown = range(1, steps + 1, max(1, steps // points))
        return {name: [(step, self.foreseen(name, step)) for step in shown] for name in self.start}

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What `resumed` needs beside the state of the optimizer."""
        names = {p: name for name, p in model.named_parameters()}
        return {
            "groups": [[names[p] for p in group["params"]] for group in self.optimizer.param_groups],
            "start": self.start,
        }


def _collapsed(cfg: Any, model: nn.Module) -> Collapsed:
    momenta = statistics_momentum(model), 1 - cfg.schedule.ema if cfg.schedule.ema else None
    slowest = min((momentum for momentum in momenta if momentum is not None), default=None)
    return Collapsed(cfg.tolerance.deviation, slowest)


def tell_plan(pull: Pull) -> None:
    ahead = pull.ahead
    strengths = ", ".join(f"{value:.4g} on {name}" for name, value in pull.strengths.items())
    log.info("centripetal strength: %s", strengths)
    log.info("%s", ahead.describe())
    if ahead.warning:
        log.warning("%s", ahead.warning)


@dataclass
class Stage:
    """One C-SGD phase on its way to one set of widths; `number` counts from 0, `step` within it.

    sums  of the steps since the last row of metrics
    """

    cfg: Any
    data: Data
    spaces: list[ChannelSpace]
    clusters: Clusters
    pull: Pull
    learner: Learner
    number: int
    journal: Journal
    tracker: Tracker
    clock: Clock
    bar: tqdm
    step: int
    sums: Sums

    def train_wide(self) -> None:
        """Trains the wide network to its cut."""
        foreseen = self.pull.ahead.collapse_step if self.cfg.trim_at == "collapse" else None
        for moment in self.train("wide"):
            late = moment.step - (foreseen or self.pull.timetable.steps)
            looks = late >= 0 and late % LOOK_EVERY == 0  # slower than the forecast: float32, a mean of means
            if looks:
                self.learner.share_buffers()
            if moment.epoch_ends or looks:
                self.tell("wide", moment)
            if looks and self.is_collapsed():
                break

    def train_narrow(self) -> None:
        for moment in self.train("trimmed"):
            if moment.epoch_ends:
                self.tell("trimmed", moment)

    def is_collapsed(self) -> bool:
        """Whether every tensor that is to be merged has collapsed, running statistics and the average included."""
        average = self.learner.average
        networks = [self.learner.model, average.module] if average else [self.learner.model]
        left = [worst_deviation(network, self.spaces, self.clusters) for network in networks]
        return all(value <= self.cfg.tolerance.deviation for value in left)

    def train(self, phase: str) -> Iterator[Moment]:
        """The steps that are left, wide or trimmed; saves at the end of each epoch, after the caller has looked."""
        every, timetable = self.cfg.checkpoint_every, self.pull.timetable
        self.clock.start(self.position(self.step))
        steps, spec = range(self.step, timetable.steps), train_spec(self.cfg, "csgd")
        for moment in train(self.learner, self.data, timetable, spec, steps, self.sums):
            self.step = moment.step
            self.bar.update()
            yield moment
            if moment.epoch_ends or (every and moment.step % every == 0):
                self.save(phase)

    def save(self, phase: str) -> None:
        more = self.pull.state(self.learner.model) | {"clusters": self.clusters}
        self.journal.save(phase, self.step, self.learner.state_dict(), self.sums, self.tracker, **more)

    def position(self, step: int) -> int:
        """The same step, counted from the start of the run."""
        return timetable_of(self.cfg, self.data, "base").steps + self.number * self.pull.timetable.steps + step

    def tell(self, phase: str, moment: Moment) -> None:
        """A row of metrics, and the pace in the bar."""
        sums = self.sums.shared()
        self.clock.tick(self.position(moment.step))
        self.tell_pace(phase, sums)
        self.log(moment, sums, accuracy(*predict(self.learner.model, self.data)))
        self.sums.clear()

    def tell_pace(self, phase: str, sums: Sums) -> None:
        """Adds to what the steps of this stage have taken, wide and trimmed, and shows it in the bar."""
        pace = self.journal.record["pace"]
        seconds, steps = pace.get(phase, (0.0, 0))
        pace[phase] = seconds + sums.seconds, steps + sums.steps
        now = ""
        if phase == "trimmed":
            wide, trimmed = (1000 * seconds / steps for seconds, steps in (pace["wide"], pace["trimmed"]))
            now = f", cut at {self.journal.record['stage']['cut_step']}: {wide:.3g} → {trimmed:.3g} ms a step"
        self.bar.set_description(f"C-SGD{now}, {self.clock.ends()}", refresh=False)

    def log(self, moment: Moment, sums: Sums, test_accuracy: float) -> None:
        schedule, optimizer, average = self.cfg.schedule, self.learner.optimizer, self.learner.average
        before = schedule.base.epochs + self.number * schedule.csgd.epochs
        row = {"epoch": before + moment.step / self.pull.timetable.steps_per_epoch, "stage": self.number + 1}
        for group in optimizer.clustered_groups():
            row[f"deviation/{group['name']}"] = float(optimizer.deviation(group))
            row[f"forecast/{group['name']}"] = self.pull.foreseen(group["name"], moment.step)
        if average:
            row["csgd/average_accuracy"] = accuracy(*predict(average.module, self.data))
        log_epoch("csgd", moment, sums, test_accuracy, self.tracker, row, self.clock.seconds_left)


def cut(
    cfg: Any,
    model: nn.Module,
    data: Data,
    spaces: list[ChannelSpace],
    clusters: Clusters,
    optimizer: CSGD,
    average: AveragedModel | None,
) -> Verdict:
    """Trims the model and the optimizer in place, and judges what that did to the outputs.

    The average of the weights is what ships, if there is one.  It is trimmed too, by its means: as it is linear in the
    weights, it goes on as the average of a run that was narrow from its start.  The worse of the two cuts counts, and
    the accuracies are the average's.
    """
    networks = [model, average.module] if average else [model]
    wide = [predict(network, data) for network in networks]
    measured = [
        dict(
            deviation=deviation(network, spaces, clusters),
            relative_deviation=worst_deviation(network, spaces, clusters),
            statistics_spread=statistics_spread(network, spaces, clusters),
        )
        for network in networks
    ]
    trim(model, spaces, clusters, optimizer, tolerance=None)
    if average:
        merge_equal(average.module, spaces, clusters)
        trim(average.module, spaces, clusters, tolerance=None)
    if cfg.after_trim == "plain":
        optimizer.unscale()
    tolerances = dict(deviation_tolerance=cfg.tolerance.deviation, logit_tolerance=cfg.tolerance.logits)
    verdicts = [
        verdict(before, predict(network, data)[0], labels, **measures, **tolerances)
        for network, (before, labels), measures in zip(networks, wide, measured, strict=True)
    ]
    return worst(verdicts)

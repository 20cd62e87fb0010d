"""The C-SGD phase: forecast, training until the collapse, the cut, and the rest of the run."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from csgd import seeds
from csgd.clusters import Clusters
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.optim import CSGD, check_stability, param_groups
from csgd.pipeline.build import as_trained
from csgd.pipeline.clock import Clock
from csgd.pipeline.journal import Journal
from csgd.pipeline.phase import chunks, log_epoch, phase_of
from csgd.plan import Plan, Timetable, plan, strengths_by
from csgd.seeds import RandomState
from csgd.tracking import Tracker
from csgd.train import Epoch, accuracy, predict, train
from csgd.trim import merge_equal, statistics_momentum, trim
from csgd.verify import Verdict, deviation, statistics_spread, verdict, worst, worst_deviation

log = logging.getLogger("csgd")

Tested = tuple[list[Tensor], Tensor]  # outputs of the test set, the logits [n, classes] first, and its labels [n]

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
    phase: dict[str, Any]
    ahead: Plan
    start: dict[str, float]

    @classmethod
    def of(cls, cfg: Any, model: nn.Module, data: Data, spaces: list[ChannelSpace], clusters: Clusters) -> "Pull":
        phase, timetable = _timetable(cfg, model, data)

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
            made, steps = optimizer(0.0, 0.0), len(timetable.learning_rates)
            within = round(cfg.collapse_by * steps)
            solved = strengths_by(made.clustered_groups(), timetable, within)
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
        return cls(made, phase, plan(made.clustered_groups(), timetable), start)

    @classmethod
    def resumed(cls, cfg: Any, model: nn.Module, data: Data, saved: dict[str, Any]) -> "Pull":
        """The phase as a checkpoint left it, before its cut or after it."""
        phase, timetable = _timetable(cfg, model, data)
        named = dict(model.named_parameters())
        optimizer = CSGD([{"params": [named[name] for name in names]} for names in saved["groups"]], lr=0.0)
        optimizer.load_state_dict(saved["optimizer"])
        clustered = [group for group in optimizer.param_groups if group["name"] in saved["start"]]
        return cls(optimizer, phase, plan(clustered, timetable), saved["start"])

    @property
    def strengths(self) -> dict[str, float]:
        """ε of each clustered group."""
        return {g["name"]: g["centri_strength"] for g in self.optimizer.param_groups if g["name"] in self.start}

    def foreseen(self, name: str, step: int) -> float:
        """The forecast deviation of a group after `step` steps."""
        return self.start[name] * self.ahead.factors[name][step - 1] ** 2

    def curves(self, points: int) -> dict[str, list[tuple[int, float]]]:
        """The forecast deviation of each group as (step, deviation), at about so many steps."""
        steps = self.phase["steps"]
        shown = range(1, steps.stop + 1, max(1, steps.stop // points))
        return {name: [(step, self.foreseen(name, step)) for step in shown] for name in self.start}

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What `resumed` needs beside the state of the optimizer."""
        names = {p: name for name, p in model.named_parameters()}
        return {
            "groups": [[names[p] for p in group["params"]] for group in self.optimizer.param_groups],
            "start": self.start,
        }


def _timetable(cfg: Any, model: nn.Module, data: Data) -> tuple[dict[str, Any], Timetable]:
    phase = phase_of(cfg, data, "csgd")
    rates, ramps = ([phase[at](step) for step in phase["steps"]] for at in ("lr_at", "ramp_at"))
    momenta = statistics_momentum(model), 1 - cfg.schedule.ema if cfg.schedule.ema else None
    slowest = min((momentum for momentum in momenta if momentum is not None), default=None)
    return phase, Timetable(rates, ramps, cfg.tolerance.deviation, slowest)


def tell_plan(pull: Pull) -> None:
    ahead = pull.ahead
    strengths = ", ".join(f"{value:.4g} on {name}" for name, value in pull.strengths.items())
    log.info("centripetal strength: %s", strengths)
    log.info("%s", ahead.describe())
    if ahead.warning:
        log.warning("%s", ahead.warning)


@dataclass(frozen=True)
class Stage:
    """One C-SGD phase on its way to one set of widths; `number` counts from 0.

    scaler  of the gradients, for float16;  average  of the weights, if there is one
    """

    cfg: Any
    model: nn.Module
    data: Data
    spaces: list[ChannelSpace]
    clusters: Clusters
    pull: Pull
    scaler: GradScaler | None
    average: AveragedModel | None
    number: int
    journal: Journal
    tracker: Tracker
    clock: Clock
    bar: tqdm

    def train_wide(self, done: int, random_state: RandomState | None) -> tuple[int, RandomState | None, Tested | None]:
        """Trains the wide network from step `done` to its cut; the step of that, and what `train` returns there."""
        network, tested = as_trained(self.cfg, self.model), None
        end = self.pull.phase["steps"].stop
        foreseen = self.pull.ahead.collapse_step if self.cfg.trim_at == "collapse" else None
        if done < (foreseen or end):
            random_state, tested = self.train(network, "wide", range(done, foreseen or end), random_state)
            done = foreseen or end
        while foreseen and done < end:
            past = (done - foreseen) % LOOK_EVERY  # a run that goes on looks where it would have looked
            if not past and self.is_collapsed():
                break
            more = range(done, min(done + LOOK_EVERY - past, end))  # slower than the forecast: float32, a mean of means
            random_state, tested = self.train(network, "wide", more, random_state)
            done = more.stop
        return done, random_state, tested

    def is_collapsed(self) -> bool:
        """Whether every tensor that is to be merged has collapsed, running statistics and the average included."""
        networks = [self.model, self.average.module] if self.average else [self.model]
        left = [worst_deviation(network, self.spaces, self.clusters) for network in networks]
        return all(value <= self.cfg.tolerance.deviation for value in left)

    def train(
        self, network: nn.Module, phase: str, steps: range, random_state: RandomState | None
    ) -> tuple[RandomState | None, Tested | None]:
        """Some steps, wide or trimmed: metrics at the end of each epoch and of `steps`, and checkpoints.

        Takes and returns the random state at the first and after the last step, and returns what the network
        says of the test set after the last one; None where there is no step.
        """
        arguments, optimizer, tested = self.pull.phase, self.pull.optimizer, None
        self.clock.start(self.position(steps.start))
        for part in chunks(steps, self.cfg.checkpoint_every):
            here = arguments | {"steps": part, "bar": self.bar, "random_state": random_state}
            here |= {"scaler": self.scaler, "average": self.average}
            for epoch in train(network, optimizer, self.data, **here):
                measured = epoch.step % arguments["steps_per_epoch"] == 0 or epoch.step == steps.stop
                tested = predict(self.model, self.data) if measured else None
                self.clock.tick(self.position(epoch.step))
                self.tell_pace(phase, epoch)
                if tested:
                    self.log(epoch, accuracy(*tested))
                self.save(phase, epoch.step)
            random_state = seeds.random_state()
        return random_state, tested

    def save(self, phase: str, step: int) -> None:
        states = {
            key: value and value.state_dict() for key, value in (("scaler", self.scaler), ("average", self.average))
        }
        more = self.pull.state(self.model) | states | {"clusters": self.clusters}
        self.journal.save(phase, step, self.model, self.pull.optimizer, self.tracker, **more)

    def position(self, step: int) -> int:
        """The same step, counted from the start of the run."""
        base = phase_of(self.cfg, self.data, "base")["steps"].stop
        return base + self.number * self.pull.phase["steps"].stop + step

    def tell_pace(self, phase: str, epoch: Epoch) -> None:
        """Adds to what the steps of this stage have taken, wide and trimmed, and shows it in the bar."""
        pace = self.journal.record["pace"]
        seconds, steps = pace.get(phase, (0.0, 0))
        pace[phase] = seconds + epoch.seconds, steps + epoch.steps
        now = ""
        if phase == "trimmed":
            wide, trimmed = (1000 * seconds / steps for seconds, steps in (pace["wide"], pace["trimmed"]))
            now = f", cut at {self.journal.record['stage']['cut_step']}: {wide:.3g} → {trimmed:.3g} ms a step"
        self.bar.set_description(f"C-SGD{now}, {self.clock.ends()}", refresh=False)

    def log(self, epoch: Epoch, test_accuracy: float) -> None:
        schedule = self.cfg.schedule
        before = schedule.base.epochs + self.number * schedule.csgd.epochs
        row = {"epoch": before + epoch.step / self.pull.phase["steps_per_epoch"], "stage": self.number + 1}
        for group in self.pull.optimizer.clustered_groups():
            row[f"deviation/{group['name']}"] = float(self.pull.optimizer.deviation(group))
            row[f"forecast/{group['name']}"] = self.pull.foreseen(group["name"], epoch.step)
        if self.average:
            row["csgd/average_accuracy"] = accuracy(*predict(self.average.module, self.data))
        log_epoch("csgd", epoch, test_accuracy, self.tracker, row, self.clock.seconds_left)


def cut(
    cfg: Any,
    model: nn.Module,
    data: Data,
    spaces: list[ChannelSpace],
    clusters: Clusters,
    optimizer: CSGD,
    average: AveragedModel | None,
    tested: Tested | None,
) -> Verdict:
    """Trims the model and the optimizer in place, and judges what that did to the outputs, which were `tested`.

    The average of the weights is what ships, if there is one.  It is trimmed too, by its means: as it is linear in the
    weights, it goes on as the average of a run that was narrow from its start.  The worse of the two cuts counts, and
    the accuracies are the average's.
    """
    networks = [model, average.module] if average else [model]
    wide = [tested or predict(model, data), *(predict(network, data) for network in networks[1:])]
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

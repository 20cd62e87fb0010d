"""The configuration, regrouped by what reads it: the only file that knows its keys."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch

from csgd.schedule import Timetable, learning_rate, ramp
from csgd.train import TrainSpec

if TYPE_CHECKING:
    from conf.schema import Clustering, Config, Deps, Phase, Wandb

# Fractions of the steps, from experiments/study_curve.md and study_collapse.md: a Collapse takes the deviation along
# whatever the learning rates are, the published pull needs rates to sum up.
COLLAPSE_BY, COLLAPSE_BY_PUBLISHED = 0.5, 0.75
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """What a run is computed on and how.

    device  auto | cpu | cuda;  threads  None: torch's own choice
    """

    device: str
    threads: int | None
    ranks: int
    sync_bn: bool
    precision: torch.dtype
    compile: bool


@dataclass(frozen=True)
class Sgd:
    """What a step of SGD needs beside its gradient and its learning rate.

    weight_decay_vectors  None: what a training takes by itself
    """

    momentum: float
    nesterov: bool
    weight_decay: float
    weight_decay_vectors: float | None
    bias_lr_factor: float


@dataclass(frozen=True)
class BaseSpec:
    """The base network: where its weights come from, or how it is trained.

    weights  a file, or the name of weights that torchvision publishes;  cache  folder of those that were trained
    """

    weights: str | None
    cache: str
    optimizer: str
    rates: "Phase"
    train: TrainSpec


@dataclass(frozen=True)
class Published:
    """The pull of CSGD, as published: part of the gradient of SGD.

    strength  ε; None: the smallest that collapses the filters by the fraction `collapse_by` of the steps
    ramp      of ε, up to there
    """

    strength: float | None
    vector_ratio: float
    ramp: str


@dataclass(frozen=True)
class PullSpec:
    """The training that pulls the filters of a cluster together.

    published    None: a Collapse pulls, along `curve`
    collapse_by  the fraction of the steps after which they are equal
    average      decay of the moving average of the weights, if there is one
    """

    published: Published | None
    curve: str
    collapse_by: float
    average: float | None
    optimizer: str
    rates: "Phase"
    train: TrainSpec


@dataclass(frozen=True)
class CutSpec:
    """How a stage is cut and when, what it goes on as, and what is tolerated.

    way         the name of one of `ways.WAYS`
    importance  what prune judges channels by
    equal_cost  whether a rival takes as many steps as cost what csgd does
    """

    way: str
    importance: str
    equal_cost: bool
    at_collapse: bool
    then_plain: bool
    deviation: float
    logits: float


@dataclass(frozen=True)
class Trial:
    """A rate that was tried, and its score on the images held out; NaN where it did not come to its end, and why."""

    lr: float
    score: float
    seconds: float
    failure: str


@dataclass(frozen=True)
class RunSpec:
    """One run.

    save_every  steps between two checkpoints within an epoch;  config  the configuration as plain JSON
    validation  the part of the training images that is tested on, in the place of the test set
    test_every  epochs between two tests
    trials      of tune.lr, of which the best gave the learning rate
    """

    seed: int
    batch_size: int
    model: Mapping[str, Any]
    dataset: Mapping[str, Any]
    deps: "Deps"
    clustering: "Clustering"
    machine: Machine
    sgd: Sgd
    base: BaseSpec
    pull: PullSpec
    cut: CutSpec
    save_every: int | None
    resume: bool
    plan_only: bool
    wandb: "Wandb"
    shows_bar: bool
    quiet: bool
    export: str | None
    draws_report: bool
    validation: float | None
    test_every: int
    config: Mapping[str, Any]
    trials: tuple[Trial, ...] = ()

    @property
    def tested_on(self) -> str:
        """What scores are of: nothing is called a test that was held out of the training images."""
        return "held-out" if self.validation else "test"

    @classmethod
    def of(cls, c: "Config") -> "RunSpec":
        """From an object of the schema in conf/."""
        s, machine = c.schedule, machine_of(c)

        def train(phase: "Phase") -> TrainSpec:
            every = c.distributed.check_every
            return TrainSpec(c.seed, phase.clip_norm, s.label_smoothing, s.accumulation, machine.precision, every)

        return cls(
            seed=c.seed,
            batch_size=s.batch_size,
            model=c.model,
            dataset=c.dataset,
            deps=c.deps,
            clustering=c.clustering,
            machine=machine,
            sgd=Sgd(s.momentum, s.nesterov, s.weight_decay, s.weight_decay_vectors, s.bias_lr_factor),
            base=BaseSpec(c.base.weights, c.base.cache, s.base.optimizer, s.base, train(s.base)),
            pull=pull_of(c, train(s.csgd)),
            cut=cut_of(c),
            save_every=c.checkpoint_every,
            resume=c.resume == "auto",
            plan_only=c.plan_only,
            wandb=c.wandb,
            shows_bar=c.progress and not c.quiet,
            quiet=c.quiet,
            export=c.export,
            draws_report=c.report,
            validation=c.validation,
            test_every=s.test_every,
            config=plain(c),
        )


def plain(c: "Config") -> dict[str, Any]:
    """The configuration as plain JSON."""
    return asdict(c, dict_factory=lambda pairs: {k: str(v) if isinstance(v, StrEnum) else v for k, v in pairs})


def machine_of(c: "Config") -> Machine:
    ranks = c.distributed
    return Machine(c.device, c.threads, ranks.nproc, ranks.sync_bn, PRECISIONS[c.precision], c.compile)


def cut_of(c: "Config") -> CutSpec:
    way = c.method, _or(c.importance, "l1"), _or(c.cost, "equal") == "equal"
    return CutSpec(*way, c.trim_at == "collapse", c.after_trim == "plain", c.tolerance.deviation, c.tolerance.logits)


def pull_of(c: "Config", train: TrainSpec) -> PullSpec:
    published, s = None, c.schedule
    if c.centri_strength is not None:
        strength = None if c.centri_strength == "auto" else c.centri_strength
        published = Published(strength, _or(c.vector_ratio, 1.0), _or(c.ramp, "cosine"))
    by = _or(c.collapse_by, COLLAPSE_BY if published is None else COLLAPSE_BY_PUBLISHED)
    return PullSpec(published, _or(c.curve, "cosine"), by, s.ema, s.csgd.optimizer, s.csgd, train)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def timetable_of(rates: "Phase", batches: int, pull: PullSpec | None = None, *, length: int | None = None) -> Timetable:
    """Every step of a training whose epochs have so many batches at most; with the ramp of its pull.

    length  the number of steps, over which its learning rates are stretched; None: that of its epochs
    """
    per_epoch = min(batches, rates.max_steps or batches)
    steps = range(length or rates.epochs * per_epoch)
    stretch = len(steps) / (rates.epochs * per_epoch)
    how, ramps = {key: getattr(rates, key) for key in ("lr", "decay", "gamma")}, None
    how |= {key: stretch * getattr(rates, key) for key in ("epochs", "warmup_epochs")}
    how["milestones"] = [stretch * milestone for milestone in rates.milestones]
    if pull and pull.published:
        length = round(pull.collapse_by * len(steps))
        ramps = [ramp(step, length=length, shape=pull.published.ramp) for step in steps]
    return Timetable(per_epoch, [learning_rate(step, steps_per_epoch=per_epoch, **how) for step in steps], ramps)

"""Types and ranges of our own keys.  Imports nothing heavy: `--help` and `--cfg job` answer without torch.

Hydra checks the types and the allowed words while it composes; the ranges are checked when the composed configuration
is turned into these objects, before anything else happens.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class ConfigError(ValueError):
    """A value that is not allowed: one line that names the key and what is."""


class Optimizer(StrEnum):
    sgd = auto()
    adamw = auto()


USUAL_LR = {Optimizer.sgd: 0.01, Optimizer.adamw: 3e-4}
USUAL_GAMMA = 0.1


class Decay(StrEnum):
    cosine = auto()
    step = auto()
    constant = auto()


class Curve(StrEnum):
    cosine = auto()
    linear = auto()


class Ramp(StrEnum):
    constant = auto()
    linear = auto()
    quadratic = auto()
    cosine = auto()


class Method(StrEnum):
    kmeans = auto()
    even = auto()
    imbalanced = auto()


class Way(StrEnum):
    csgd = auto()
    merge = auto()
    prune = auto()
    scratch = auto()


class Importance(StrEnum):
    l1 = auto()
    l2 = auto()
    taylor = auto()


class Cost(StrEnum):
    equal = auto()
    schedule = auto()


class Of(StrEnum):
    pacesetter = auto()
    producers = auto()
    outputs = auto()


class Allot(StrEnum):
    uniform = auto()
    sensitivity = auto()


class Mode(StrEnum):
    online = auto()
    offline = auto()
    disabled = auto()


class TrimAt(StrEnum):
    collapse = auto()
    end = auto()


class AfterTrim(StrEnum):
    same_run = auto()
    plain = auto()


class Resume(StrEnum):
    auto = "auto"
    never = "never"


class Export(StrEnum):
    onnx = auto()
    torch = auto()
    all = auto()


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp32 = auto()
    bf16 = auto()
    fp16 = auto()


def _require(holds: bool, key: str, allowed: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


@dataclass
class Base:
    weights: str | None = None  # a file, or the name of weights that torchvision publishes
    cache: str = MISSING  # the folder in which trained base networks are kept


@dataclass
class Phase:
    """Length and learning rate of one training: the base network's, or C-SGD's."""

    epochs: int = MISSING  # its length
    lr: float | None = MISSING  # learning rate at its highest; null: 0.01 of sgd, 0.0003 of adamw
    optimizer: Optimizer | None = None  # null: sgd, but adamw beside a Collapse; the published pull needs sgd
    warmup_epochs: float = 0.0  # in which the learning rate rises from 0
    decay: Decay = Decay.cosine  # of the learning rate, after the warm-up
    milestones: list[float] = field(default_factory=list)  # of decay=step: the epochs at which the learning rate falls
    gamma: float | None = None  # of decay=step: the factor by which it falls; null: 0.1
    clip_norm: float | None = None  # the largest norm of the gradient of all parameters; null: not clipped
    max_steps: int | None = None  # per epoch; null: all batches

    def check(self, key: str) -> None:
        _require(self.epochs >= 1, f"{key}.epochs", "1 or more", self.epochs)
        _require(self.lr is None or _positive(self.lr), f"{key}.lr", "above 0, or null", self.lr)
        _require(
            0 <= self.warmup_epochs <= self.epochs, f"{key}.warmup_epochs", "within the epochs", self.warmup_epochs
        )
        clip = self.clip_norm
        _require(clip is None or _positive(clip), f"{key}.clip_norm", "above 0, or null", clip)
        self._check_decay(key)
        _require(
            self.max_steps is None or self.max_steps >= 1, f"{key}.max_steps", "1 or more, or null", self.max_steps
        )

    def settle(self, usual: Optimizer) -> None:
        """Puts the optimizer and its usual learning rate in the place of null."""
        self.optimizer = self.optimizer or usual
        self.lr = USUAL_LR[self.optimizer] if self.lr is None else self.lr

    def _check_decay(self, key: str) -> None:
        """Milestones and gamma are of decay=step, which needs milestones that it comes to."""
        gamma, milestones, where = self.gamma, list(self.milestones), f"where decay is {self.decay}"
        _require(gamma is None or 0 < gamma <= 1, f"{key}.gamma", "above 0 and at most 1", gamma)
        if self.decay is Decay.step:
            within = bool(milestones) and all(0 < milestone < self.epochs for milestone in milestones)
            allowed = f"epochs above 0 and below {key}.epochs={self.epochs} {where}"
            _require(within, f"{key}.milestones", allowed, milestones)
        else:
            _require(not milestones, f"{key}.milestones", f"[] {where}", milestones)
            _require(gamma is None, f"{key}.gamma", f"null {where}", gamma)
        self.gamma = USUAL_GAMMA if gamma is None else gamma


@dataclass
class Schedule:
    batch_size: int = MISSING  # images of a step, of all ranks together
    momentum: float = 0.9  # of sgd, in both trainings
    nesterov: bool = True  # whether that is Nesterov's
    weight_decay: float = MISSING  # η of kernels, in both trainings
    weight_decay_vectors: float | None = None  # of vectors; null: 0 in C-SGD, weight_decay in the base's training
    bias_lr_factor: float = 1.0  # biases learn at lr times this, in both trainings
    label_smoothing: float = 0.0  # the share of a label that is spread over all classes, in both trainings
    ema: float | None = None  # decay of a moving average of the weights, of C-SGD: what the run then ends with
    accumulation: int = 1  # parts in which a batch goes through the network: less memory, the same gradient
    test_every: int = 1  # epochs between two tests, each a row of metrics; the last epoch is tested in any case
    base: Phase = MISSING
    csgd: Phase = MISSING

    def __post_init__(self):
        _require(self.batch_size >= 2, "schedule.batch_size", "2 or more", self.batch_size)
        _require(0 <= self.momentum < 1, "schedule.momentum", "at least 0 and below 1", self.momentum)
        _require(self.momentum > 0 or not self.nesterov, "schedule.nesterov", "false without momentum", self.nesterov)
        vectors = self.weight_decay_vectors
        _require(_not_negative(self.weight_decay), "schedule.weight_decay", "0 or more", self.weight_decay)
        fits = vectors is None or _not_negative(vectors)
        _require(fits, "schedule.weight_decay_vectors", "0 or more, or null", vectors)
        _require(_positive(self.bias_lr_factor), "schedule.bias_lr_factor", "above 0", self.bias_lr_factor)
        smoothing, parts = self.label_smoothing, self.accumulation
        _require(0 <= smoothing < 1, "schedule.label_smoothing", "at least 0 and below 1", smoothing)
        decay = self.ema
        _require(decay is None or 0 < decay < 1, "schedule.ema", "above 0 and below 1, or null", decay)
        fits = 1 <= parts <= self.batch_size // 2  # batch norm needs two images
        _require(fits, "schedule.accumulation", f"between 1 and {self.batch_size // 2}, half of the batch", parts)
        _require(self.test_every >= 1, "schedule.test_every", "1 or more", self.test_every)
        self.base.check("schedule.base")
        self.base.settle(Optimizer.sgd)
        self.csgd.check("schedule.csgd")


@dataclass
class Deps:
    """Target widths: `widths` if given, else `layers` with `fraction` for the rest, else those that meet the budget
    `macs`, `params` or `latency`, else `fraction` of every layer."""

    fraction: float = MISSING  # of the channels of every space, that are left
    widths: list[int] | None = None  # one for each layer that can be cut, or for each space, in place of fraction
    layers: Any = None  # {pattern of layer names: fraction or width}; the last match wins, fraction is the rest's
    macs: float | None = None  # budget: the fraction of the multiply-accumulates that is left, at most
    params: float | None = None  # budget: the fraction of the parameters that is left, at most
    latency: float | None = None  # budget: the fraction of the time that eight images take on this machine, at most
    allot: Allot = Allot.uniform  # of a budget: one fraction of every layer, or by what merging each alone does
    stages: list[float] | None = None  # fractions of the widths at the start, one cut after the other
    min_width: int = 2  # no layer becomes narrower: one channel breaks squeeze()
    round_to: int = 1  # fractions give multiples of it, which some devices are faster with
    keep: list[str] = field(default_factory=list)  # patterns of layers that stay whole

    def __post_init__(self):
        _require(0 < self.fraction <= 1, "deps.fraction", "above 0 and at most 1", self.fraction)
        _require(self.layers is None or isinstance(self.layers, dict), "deps.layers", "a mapping", self.layers)
        _require(self.layers is None or self.widths is None, "deps.layers", "null beside deps.widths", self.layers)
        budgets = ("macs", "params", "latency")
        given = [key for key in ("widths", "layers", "stages", *budgets) if getattr(self, key) is not None]
        for key in budgets:
            budget = getattr(self, key)
            _require(budget is None or 0 < budget <= 1, f"deps.{key}", "above 0 and at most 1, or null", budget)
            others = " and ".join(f"deps.{other}" for other in given if other != key)
            _require(budget is None or not others, f"deps.{key}", f"null beside {others}", budget)
        even = self.allot is Allot.uniform or not {*budgets}.isdisjoint(given)
        _require(even, "deps.allot", "uniform without a budget (deps.macs, params or latency)", str(self.allot))
        if self.stages is not None:
            falling = bool(self.stages) and all(a > b for a, b in zip(self.stages, self.stages[1:], strict=False))
            fits = falling and self.stages[-1] > 0 and self.stages[0] <= 1
            _require(fits, "deps.stages", "falling fractions above 0 and at most 1", self.stages)
            alone = self.widths is None and self.layers is None
            _require(alone, "deps.stages", "without deps.widths and deps.layers", self.stages)
        _require(self.min_width >= 1, "deps.min_width", "1 or more", self.min_width)
        _require(self.round_to >= 1, "deps.round_to", "1 or more", self.round_to)


@dataclass
class Clustering:
    method: Method = MISSING  # how filters are put into clusters
    of: Of = Of.pacesetter  # k-means on its kernels, on those of all producers of a space, or on their outputs

    def __post_init__(self):
        reads = self.method is Method.kmeans or self.of is Of.pacesetter
        _require(reads, "clustering.of", f"pacesetter where clustering.method is {self.method}", str(self.of))


@dataclass
class Tolerance:
    deviation: float = MISSING  # of ‖W − ΓW‖ / ‖W‖ of each tensor, running statistics too: at most this is collapsed
    logits: float = MISSING  # of the change of an image's logits / their spread (max − min): at most this is lossless

    def __post_init__(self):
        for key in ("deviation", "logits"):
            _require(_positive(getattr(self, key)), f"tolerance.{key}", "above 0", getattr(self, key))


@dataclass
class Wandb:
    mode: Mode = MISSING  # offline needs no account; also by WANDB_MODE
    project: str = "${oc.env:WANDB_PROJECT,csgd}"  # that the run is shown in
    entity: str | None = None  # user or team; null: your own
    group: str | None = None  # of runs; null: that of the sweep
    tags: list[str] = field(default_factory=list)  # of the run


@dataclass
class Distributed:
    nproc: int = MISSING  # ranks on this machine, each in its own process
    sync_bn: bool = False  # batch norm over the images of all ranks
    check_every: int | None = None  # steps between two comparisons of the parameters of all ranks, bit by bit

    def __post_init__(self):
        _require(self.nproc >= 1, "distributed.nproc", "1 or more", self.nproc)
        every = self.check_every
        _require(every is None or every >= 1, "distributed.check_every", "1 or more, or null", every)


@dataclass
class Tune:
    """Trials before the run: each is a run of its own, with a tenth of the training images held out."""

    lr: list[float] = field(default_factory=list)  # in the place of schedule.csgd.lr: the best of these; []: no trials
    held_out: float = 0.1  # the part of the training images by which trials are judged

    def __post_init__(self):
        names = {f"{lr:g}" for lr in self.lr}  # of the folders of the trials
        fits = all(map(_positive, self.lr)) and len(names) == len(self.lr)
        _require(fits, "tune.lr", "different rates above 0, in their first six digits, or []", self.lr)
        _require(0 < self.held_out < 1, "tune.held_out", "above 0 and below 1", self.held_out)


@dataclass
class Config:
    model: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    deps: Deps = MISSING
    clustering: Clustering = MISSING
    schedule: Schedule = MISSING
    wandb: Wandb = MISSING
    base: Base = MISSING
    tolerance: Tolerance = MISSING
    distributed: Distributed = MISSING
    method: Way = Way.csgd  # csgd: filters are made equal by training; its rivals, cut at once: merge, prune, scratch
    importance: Importance | None = None  # of method=prune: what is deleted matters least by it; null: l1
    cost: Cost | None = None  # of the other methods: as much as csgd's, or the steps of schedule.csgd; null: equal
    centri_strength: Any = None  # null: filters are made equal along a curve; ε, or auto: pulled by SGD, as published
    curve: Curve | None = None  # along which they are made equal; null: cosine
    vector_ratio: float | None = None  # of the published pull: the factor of ε on vectors; null: 1
    ramp: Ramp | None = None  # of the published pull: how ε rises up to collapse_by; null: cosine
    collapse_by: float | None = None  # the fraction of the run by which filters are equal; null: 0.5, as published 0.75
    trim_at: TrimAt = MISSING
    after_trim: AfterTrim = MISSING
    resume: Resume = MISSING
    checkpoint_every: int | None = None
    export: Export | None = None
    validation: float | None = None  # the part of the training images that is held out, and tested on instead
    tune: Tune = field(default_factory=Tune)
    seed: int = MISSING
    device: Device = MISSING  # auto: a GPU where there is one
    threads: int | None = None
    precision: Precision = MISSING
    compile: bool = False
    progress: bool = True
    quiet: bool = False
    plan_only: bool = False
    report: bool = True  # false: no pictures and no page, which take some seconds a run

    def __post_init__(self):
        self._check_pull()
        self._check_way()
        part = self.validation
        free = self.validation is None or not self.tune.lr
        _require(free, "validation", "null beside tune.lr, whose trials hold out tune.held_out", self.validation)
        _require(part is None or 0 < part < 1, "validation", "above 0 and below 1, or null", part)
        every = self.checkpoint_every
        _require(every is None or every >= 1, "checkpoint_every", "1 or more, or null", every)
        _require(0 <= self.seed < 2**31, "seed", "between 0 and 2147483647", self.seed)
        _require(self.threads is None or self.threads >= 1, "threads", "1 or more, or null", self.threads)
        for group in ("model", "dataset"):
            target = getattr(self, group).get("_target_")
            _require(
                isinstance(target, str) and "." in target, f"{group}._target_", "a dotted path to a callable", target
            )

    def _check_way(self) -> None:
        """Each way to prune has keys of its own: one that the others would not look at is refused."""
        pulls, where = self.method is Way.csgd, f"where method is {self.method}"
        _require(self.importance is None or self.method is Way.prune, "importance", f"null {where}", self.importance)
        _require(self.cost is None or not pulls, "cost", f"null {where}", self.cost)
        _require(pulls or self.trim_at is TrimAt.collapse, "trim_at", f"collapse {where}", self.trim_at)
        _require(pulls or self.after_trim is AfterTrim.plain, "after_trim", f"plain {where}", self.after_trim)
        if self.method in (Way.prune, Way.scratch):  # which make no clusters
            of, method = self.clustering.of, self.clustering.method
            _require(method is Method.kmeans, "clustering.method", f"{Method.kmeans} {where}", str(method))
            _require(of is Of.pacesetter, "clustering.of", f"{Of.pacesetter} {where}", str(of))
        if self.method is Way.scratch:
            _require(self.deps.stages is None, "deps.stages", f"null {where}", self.deps.stages)
            _require(self.base.weights is None, "base.weights", f"null {where}", self.base.weights)

    def _check_pull(self) -> None:
        """Each pull has keys of its own: one that the others would not look at is refused."""
        strength, by, ratio, csgd = self.centri_strength, self.collapse_by, self.vector_ratio, self.schedule.csgd
        number = isinstance(strength, int | float) and not isinstance(strength, bool) and _not_negative(strength)
        allowed = "a number of 0 or more, auto, or null"
        _require(number or strength in ("auto", None), "centri_strength", allowed, strength)
        _require(by is None or 0 < by <= 1, "collapse_by", "above 0 and at most 1, or null", by)
        _require(ratio is None or _not_negative(ratio), "vector_ratio", "0 or more, or null", ratio)
        told = "null" if strength is None else strength
        _require(ratio is None or number, "vector_ratio", f"null where centri_strength is {told}", ratio)
        if strength is None:
            _require(self.ramp is None, "ramp", "null where centri_strength is null (curve is its key)", str(self.ramp))
            told = "given beside schedule.csgd.lr (sgd or adamw) where centri_strength is null"
            _require(csgd.lr is None or csgd.optimizer is not None, "schedule.csgd.optimizer", told, None)
            csgd.settle(Optimizer.adamw)
        else:
            csgd.settle(Optimizer.sgd)
            curve, optimizer = self.curve, csgd.optimizer
            _require(curve is None, "curve", f"null where centri_strength is {told} (ramp is its key)", str(curve))
            sgd = optimizer is Optimizer.sgd  # fact F9
            _require(sgd, "schedule.csgd.optimizer", f"sgd where centri_strength is {told}", str(optimizer))


def register() -> None:
    """Makes the schema known to Hydra under the name that `config.yaml` lists first in its defaults."""
    ConfigStore.instance().store(name="schema", node=Config)

"""Where a run is, and all that the rest of it depends on; it saves itself, and is restored from a checkpoint."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, TypedDict

from csgd import ranks
from csgd.checkpoint import load_checkpoint, save_checkpoint
from csgd.clusters import Clusters
from csgd.errors import InputError
from csgd.folder import RunFolder
from csgd.graph import ChannelSpace
from csgd.pipeline.foresee import StagePlan
from csgd.pipeline.learners import Groups, groups_of
from csgd.pipeline.provenance import FREE_TO_GO_ON, identity, refuse_other, versions
from csgd.pipeline.setup import Setup
from csgd.pipeline.spec import RunSpec
from csgd.reload import load_trimmed
from csgd.schedule import Timetable
from csgd.seeds import RandomState, random_state, seed_all, set_random_state
from csgd.train import Learner, Moment, Sums, TrainSpec, train
from csgd.verify import Verdict

log = logging.getLogger("csgd")

FORM = 3  # of a checkpoint's file; raised when it changes
MADE_AGAIN = ("folder", "spaces", "plan", "learner", "marked")  # of a Progress, where a run goes on


class Part(StrEnum):
    """What is under way: where a run that is resumed goes on."""

    BASE = "base"
    BETWEEN = "between"  # two stages: nothing
    WIDE = "wide"
    NARROW = "narrow"


@dataclass(frozen=True)
class BaseResult:
    accuracy: float
    source: str


@dataclass(frozen=True)
class StageResult:
    """What a stage came to.

    cut_step  of `steps`, and foreseen_step the one that was forecast
    verdict   of the cut; its `accuracy` is that at the end of the stage
    curves    what was forecast to be left of the deviation of each group, as (step, fraction)
    apart     ‖W − ΓW‖ / ‖W‖ of each space, the largest of its tensors, at the start of the stage and at its cut
    """

    widths: dict[str, int]
    strengths: dict[str, float]
    steps: int
    cut_step: int
    foreseen_step: int | None
    verdict: Verdict
    curves: dict[str, list[tuple[int, float]]]
    apart: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Pace:
    """Seconds that some steps have taken."""

    seconds: float = 0.0
    steps: int = 0

    def add(self, sums: Sums) -> None:
        self.seconds, self.steps = self.seconds + sums.seconds, self.steps + sums.steps

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps


@dataclass
class Seconds:
    """What a run has taken, by what it did; `total` up to the last time that it was told."""

    cluster: float = 0.0
    base: float = 0.0
    csgd_wide: float = 0.0
    trim: float = 0.0
    csgd_trimmed: float = 0.0
    total: float = 0.0

    @contextmanager
    def spent(self, task: str) -> Iterator[None]:
        """Adds what is within to the seconds of one of them."""
        started = time.perf_counter()
        yield
        setattr(self, task, getattr(self, task) + time.perf_counter() - started)


class Checkpoint(TypedDict):
    """What is in the file of one.

    facts          a Progress, as plain JSON
    state          of the learner; between two stages of the model alone
    random_states  of every rank
    config         flat, with the versions that fix the bits of a result
    """

    form: int
    facts: dict[str, Any]
    state: dict[str, Any]
    groups: Groups
    random_states: list[RandomState]
    config: dict[str, Any]


@dataclass
class Progress:
    """The facts are saved as they are; what MADE_AGAIN lists is not.

    widths  of each stage; None until they are settled
    step   within the part; of a stage, wide and narrow
    start  Σ‖W − ΓW‖² of each group before the first step of the stage
    apart  ‖W − ΓW‖ / ‖W‖ of each space, then
    sums   of the steps since the last row of metrics;  rows  of those there are
    pace   of the steps of the stage, wide and narrow
    """

    folder: RunFolder
    part: Part = Part.BASE
    stage: int = 0
    step: int = 0
    widths: list[dict[str, int]] | None = None
    base: BaseResult | None = None
    clusters: Clusters = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    results: list[StageResult] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    pace: dict[Part, Pace] = field(default_factory=dict)
    sums: Sums = field(default_factory=Sums)
    rows: int = 0
    spaces: list[ChannelSpace] = field(default_factory=list)
    plan: StagePlan | None = None
    learner: Learner | None = None
    marked: float = field(default_factory=time.perf_counter)

    def train(self, setup: Setup, timetable: Timetable, spec: TrainSpec) -> Iterator[Moment]:
        """Takes the steps of its part that are left, and yields after each; saves once the caller has looked."""
        every, before = setup.spec.save_every, 0
        if self.part is not Part.BASE:
            before = setup.spec.base.rates.epochs + self.stage * timetable.epochs
        timetable = replace(timetable, epochs_before=before)
        for moment in train(self.learner, setup.data, timetable, spec, range(self.step, timetable.steps), self.sums):
            self.step = moment.step
            yield moment
            if moment.epoch_ends or (every and moment.step % every == 0):
                self.save(setup)

    def take_sums(self) -> Sums:
        """The sums of all ranks since this was last called, to be called on all of them; DivergedError as by `save`."""
        self.sums.check(self.step)
        shared = self.sums.shared()
        self.sums.clear()
        self.pace.setdefault(self.part, Pace()).add(shared)
        return shared

    def tick(self) -> None:
        """Brings the seconds of the whole run up to now."""
        now = time.perf_counter()
        self.seconds.total, self.marked = self.seconds.total + now - self.marked, now

    def left(self) -> dict[str, float]:
        """What is left of ‖W − ΓW‖ of each group since the stage began, as a fraction; of none once they are cut."""
        deviations = self.learner.deviations().items()
        return {name: math.sqrt(float(now) / self.start[name]) if self.start[name] else 0.0 for name, now in deviations}

    def foreseen(self, group: str, step: int) -> float:
        """What was forecast to be left of a group after `step` steps of the stage."""
        return abs(self.plan.forecast.factors[group][step - 1])

    def save(self, setup: Setup) -> None:
        """Writes a checkpoint, in one stroke; DivergedError if the weights are lost, to keep the last good one."""
        self.sums.check(self.step)
        self.tick()
        random_states, sums = ranks.gathered(random_state()), self.sums.shared()
        if not ranks.is_first():
            return
        bare = replace(self, sums=sums, spaces=[], plan=None, learner=None)
        facts = {key: value for key, value in asdict(bare).items() if key not in MADE_AGAIN}
        facts |= {"part": str(self.part), "pace": {str(part): pace for part, pace in facts["pace"].items()}}
        saved = Checkpoint(
            form=FORM,
            facts=facts,
            state=self.learner.state_dict() if self.learner else {"model": setup.model.state_dict()},
            groups=groups_of(self.learner) if self.learner else [],
            random_states=random_states,
            config=identity(setup.spec.config, versions()),
        )
        save_checkpoint(self.folder.checkpoint, saved)


def last_checkpoint(spec: RunSpec, folder: RunFolder) -> Checkpoint | None:
    """That of a run which is to go on, if there is one.

    InputError if it is of a run whose result would not be this one's, with the differences, or of another form, or if
    checkpoints are there and none of them can be read.
    """
    goes_on, path = spec.resume and not spec.plan_only, folder.checkpoint
    saved = ranks.from_first(load_checkpoint(path) if goes_on and ranks.is_first() else None)
    if saved is None:
        return None
    if "config" not in saved:
        raise InputError(f"resume=auto: '{path}' is no checkpoint of a run: it has no 'config'")
    refuse_other("resume=auto", folder.path, saved["config"], identity(spec.config, versions()), FREE_TO_GO_ON)
    if saved.get("form") != FORM:
        raise InputError(
            f"resume=auto: '{path}' is a checkpoint of form {saved.get('form', 1)}, this version writes form {FORM}; "
            "move the folder away or say resume=never to start anew"
        )
    return saved


def begin_or_resume(
    setup: Setup, folder: RunFolder, saved: Checkpoint | None, resume: Callable[[Setup, Progress, Checkpoint], None]
) -> Progress:
    """A run at its last checkpoint, or at its start.

    resume  makes what is not saved, for the part that is under way
    """
    spec, path = setup.spec, folder.checkpoint
    if saved is None:
        if spec.resume:
            log.info("resume=auto: there is no checkpoint in '%s', the run starts anew", folder)
        elif ranks.is_first() and folder.metrics.exists():
            log.warning("'%s' holds an earlier run, whose place this one takes; resume=auto would go on", folder)
        return _with_preparation(Progress(folder, widths=setup.widths if setup.settled else None), setup)
    progress = _restored(saved, setup, folder)
    resume(setup, progress, saved)
    rank, states = ranks.own_share().rank, saved["random_states"]
    if rank < len(states):
        set_random_state(states[rank])
    else:
        seed_all(spec.seed + progress.step + ranks.own_share().offset)
    log.info("resumed from %s: %s, step %d", path, progress.part, progress.step)
    return _with_preparation(progress, setup)


def _with_preparation(progress: Progress, setup: Setup) -> Progress:
    """With the seconds of its preparation."""
    progress.marked = setup.began
    progress.seconds.cluster += time.perf_counter() - setup.sought
    return progress


def _restored(saved: Checkpoint, setup: Setup, folder: RunFolder) -> Progress:
    """The facts of a checkpoint, and its weights in the network, at their widths."""
    facts = saved["facts"]
    widths = facts["results"][-1]["widths"] if facts["results"] else None
    load_trimmed(setup.model, saved["state"]["model"], example=setup.data.example, widths=widths)
    counted = dict.fromkeys(Sums.over_ranks(), 0.0)  # by rank 0 for all ranks
    results = [StageResult(**one | {"verdict": Verdict(**one["verdict"])}) for one in facts["results"]]
    typed = {
        "part": Part(facts["part"]),
        "base": facts["base"] and BaseResult(**facts["base"]),
        "results": results,
        "seconds": Seconds(**facts["seconds"]),
        "pace": {Part(part): Pace(**pace) for part, pace in facts["pace"].items()},
        "sums": Sums(**facts["sums"] | ({} if ranks.is_first() else counted)),
    }
    return Progress(folder, **facts | typed)

"""What looks on: rows of metrics, the bar, W&B, pictures.  What saves is not its business, so it never loses a run."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from csgd import ranks
from csgd.build import label
from csgd.errors import line_of
from csgd.pipeline.album import Album, keep_outputs
from csgd.pipeline.deps import wish_of
from csgd.pipeline.film import Film
from csgd.pipeline.foresee import RunPlan
from csgd.pipeline.progress import Part, Progress
from csgd.pipeline.setup import Setup
from csgd.pipeline.ways import WAYS
from csgd.report import duration, milliseconds
from csgd.tracking import Tracker
from csgd.train import Moment, measured
from csgd.verify import worst_deviation

if TYPE_CHECKING:
    from conf.schema import Deps

log = logging.getLogger("csgd")

SHAPE = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
PACED = 16  # steps of this process after which the time to the end is told
SHOW_EVERY = 16  # steps between two looks at the loss for the bar; a look waits for the device


class Watch:
    """A context manager, as the tracker is; all ranks have one, and only the first's writes."""

    def __init__(self, setup: Setup, plan: RunPlan, progress: Progress):
        """InputError, before there is a file, if W&B cannot start for want of a key."""
        spec, wandb, first = setup.spec, setup.spec.wandb, ranks.is_first()
        name = f"{label(spec.model)}-{label(spec.dataset)}-{widths_label(spec.deps)}-s{spec.seed}"
        settings = dict(project=wandb.project, entity=wandb.entity, group=wandb.group, tags=wandb.tags, name=name)
        where = progress.folder.path if first else None
        config = spec.config | ({"tuned": {"lr": spec.pull.rates.lr}} if spec.trials else {})
        self.tracker = Tracker(where, mode=str(wandb.mode), config=config, settings=settings, rows=progress.rows)
        self.plan, self._album, self._film, self._opened, self._steps = plan, None, None, ExitStack(), 0
        self._looks = True
        self._opened.push(self.tracker)
        self._shows = spec.shows_bar and first and sys.stderr.isatty()
        where = sys.stderr if self._shows else self._opened.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        how = dict(total=work_left(plan, progress), smoothing=0, leave=False, file=where, bar_format=SHAPE)
        # Hidden it counts all the same: the lines of the log have their estimate from it.
        self._bar = tqdm(desc=_where(setup, progress), **how)
        self._opened.callback(self._bar.close)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error) -> None:
        self._opened.__exit__(*error)

    def starts(self, setup: Setup, progress: Progress) -> None:
        """Training goes on here: what came before took no time that counts."""
        self._bar.unpause()
        self._bar.total = self._bar.n + work_left(self.plan, progress)
        self._bar.set_description(_where(setup, progress), refresh=False)

    def after(self, setup: Setup, progress: Progress, moment: Moment, tells: bool = False) -> None:
        """Moves the bar by a step; with `tells`, and where a test is due, a row of metrics too, of the steps since the
        last one."""
        narrow = progress.part is Part.NARROW
        cost = 1.0 if progress.part is Part.BASE else self.plan.weight(progress.stage + narrow)
        self._bar.total = self._bar.n + cost + work_left(self.plan, progress)
        self._bar.set_description(_where(setup, progress), refresh=False)
        if self._shows and moment.step % SHOW_EVERY == 1:
            self._bar.set_postfix(_shown(setup, progress, moment), refresh=False)
        self._bar.update(cost)
        self._steps += 1
        if self._steps == PACED:
            pace = progress.sums.seconds / max(1, progress.sums.steps)
            log.info("pace: %s a step, about %s to go", milliseconds(pace), duration(self.seconds_left))
        if progress.part is Part.WIDE and ranks.is_first() and self._looks:
            self._looks = False  # unless this one comes to its end: what fails is told once
            with warn_instead_of_raising("the steps of the animation"):
                self._look(setup, progress)
                self._looks = True
        if tells or is_due(setup, progress, moment):
            self._row(setup, progress, moment)
            progress.rows = self.tracker.rows

    @property
    def seconds_left(self) -> float:
        """What the rest will take at the pace so far, tests of the network included."""
        bar = self._bar.format_dict
        done = bar["n"] - bar["initial"]
        return (bar["total"] - bar["n"]) * bar["elapsed"] / done if done else float("nan")

    def keep_filters(self, setup: Setup, progress: Progress, when: str) -> None:
        """The filters of one layer for the picture of the run; when: start (of the stage) | collapse | cut.

        There are none of a way without clusters, and no collapse without a pull.
        """
        way = WAYS[setup.spec.cut.way]
        if not ranks.is_first() or not way.proven or (when == "collapse" and not way.pulls):
            return
        with warn_instead_of_raising("the filters for their picture"):
            if when != "cut":  # of a stage that is wide, also where a resumed run comes into it
                where = progress.folder.filters, progress.stage
                self._album = None
                self._album = Album.of(*where, setup.model, progress.spaces, progress.clusters)
            if self._album:
                self._album.keep(setup.model, when)

    def keep_outputs(self, progress: Progress, before: list[Tensor], after: list[Tensor]) -> None:
        """What the network says of the test set before a cut and after it, for their picture."""
        if ranks.is_first():
            with warn_instead_of_raising("the outputs around the cut"):
                keep_outputs(progress.folder.outputs, progress.stage, before, after)

    def _look(self, setup: Setup, progress: Progress) -> None:
        """Takes a frame of the animation where one is due, of a stage from its start or where a resumed run goes on."""
        stage, step = progress.stage, progress.step
        if self._film is None or self._film.stage != stage:
            album = Album.of(progress.folder.filters, stage, setup.model, progress.spaces, progress.clusters)
            left = dict.fromkeys(progress.start, 1.0)
            self._film = Film.of(progress.folder.film, stage, album, progress.plan.due, step - 1, left)
        if self._film.is_due(step):
            self._film.take(setup.model, step, progress.left())

    def _row(self, setup: Setup, progress: Progress, moment: Moment) -> None:
        sums, tested, score = progress.take_sums(), measured(setup.model, setup.data), setup.data.task["score"]
        part, on = "base" if progress.part is Part.BASE else "csgd", setup.spec.tested_on
        values = {
            "loss": sums.mean_loss,
            **({} if setup.data.score else {"train_accuracy": sums.accuracy}),
            f"{on.replace('-', '_')}_{score}": tested,
            "lr": moment.lr,
            "seconds": sums.seconds,
            "seconds_per_step": sums.seconds_per_step,
        }
        row = {"epoch": moment.epoch} if part == "base" else _stage_row(setup, progress, moment)
        self.tracker.log({"phase": part, "step": moment.step} | {f"{part}/{k}": v for k, v in values.items()} | row)
        log.info(
            "%s epoch %d: loss %.4f, %s %s %.4f, lr %.2g%s, %.1f s (%s a step), %s to go",
            part,
            moment.epoch,
            sums.mean_loss,
            on,
            score,
            tested,
            moment.lr,
            f", deviation {row['csgd/deviation']:.1e}" if "csgd/deviation" in row else "",
            sums.seconds,
            milliseconds(sums.seconds_per_step),
            duration(self.seconds_left),
        )


def widths_label(deps: "Deps") -> str:
    """What of deps counts, as a word in a name."""
    if deps.stages is not None:
        return "to".join(f"{fraction:g}" for fraction in deps.stages)
    if deps.widths is not None:
        return f"widths{sum(deps.widths)}"
    for key, budget in wish_of(deps).items():
        return f"{key}{budget:g}" + ("by_sensitivity" if deps.allot == "sensitivity" else "")
    return f"{deps.fraction:g}" + ("layers" if deps.layers else "")


def is_due(setup: Setup, progress: Progress, moment: Moment) -> bool:
    """Whether a test is due: at the end of every so many epochs, and of the last."""
    last = (setup.base if progress.part is Part.BASE else setup.csgd).steps
    return moment.epoch_ends and (moment.epoch % setup.spec.test_every == 0 or moment.step == last)


def work_left(plan: RunPlan, progress: Progress) -> float:
    """What the rest of a run costs, in steps of the wide network; a stage that is wide is cut when it is due."""
    under_way = progress.part in (Part.WIDE, Part.NARROW)
    later = range(progress.stage + under_way, len(plan.costs) - 1)
    left = sum(plan.stage_work(stage) for stage in later)
    if progress.part is Part.BASE:
        left += plan.base_steps - progress.step
    if under_way:
        left += plan.stage_work(progress.stage, progress.step, progress.part is Part.NARROW)
    return left


def _where(setup: Setup, progress: Progress) -> str:
    """The step, and what the cut has made of the cost of one."""
    if progress.part is Part.BASE:
        return f"base, step {progress.step} of {setup.base.steps}"
    stages = len(setup.widths)
    number = f" {min(progress.stage + 1, stages)} of {stages}" if stages > 1 else ""
    name = "C-SGD" if WAYS[setup.spec.cut.way].pulls else "narrow network"
    if progress.part is not Part.NARROW:
        return f"{name}{number}, step {progress.step} of {setup.csgd.steps}"
    pace, cut = "", progress.results[-1].cut_step
    if Part.NARROW in progress.pace and Part.WIDE in progress.pace:
        wide, narrow = (milliseconds(progress.pace[part].seconds_per_step) for part in (Part.WIDE, Part.NARROW))
        pace = f": {wide} → {narrow} a step"
    return f"{name}{number}, step {progress.step} of {setup.csgd.steps}, cut at {cut}{pace}"


def _shown(setup: Setup, progress: Progress, moment: Moment) -> dict[str, str]:
    """What the bar says beside the steps, of this rank alone."""
    sums = progress.sums
    loss = sums.mean_loss * ranks.own_share().ranks
    shown = {"loss": f"{loss:.3f}"} | ({} if setup.data.score else {"accuracy": f"{sums.accuracy:.3f}"})
    shown["lr"] = f"{moment.lr:.1e}"
    if progress.part is Part.WIDE:
        shown["left"] = f"{max(progress.left().values()):.1e}"
    return shown


def _stage_row(setup: Setup, progress: Progress, moment: Moment) -> dict[str, float]:
    """Where in the run, the deviation, and what is left of that of each group beside its forecast."""
    before = setup.spec.base.rates.epochs * WAYS[setup.spec.cut.way].trained
    steps = progress.stage * setup.csgd.steps + moment.step
    row = {"epoch": before + steps / setup.csgd.steps_per_epoch, "stage": progress.stage + 1}
    if progress.part is Part.WIDE:
        row["csgd/deviation"] = worst_deviation(setup.model, progress.spaces, progress.clusters)
    for group, left in progress.left().items():
        row[f"left/{group}"], row[f"forecast/{group}"] = left, progress.foreseen(group, moment.step)
    if average := progress.learner.average:
        row[f"csgd/average_{setup.data.task['score']}"] = measured(average.module, setup.data)
    return row


@contextmanager
def warn_instead_of_raising(what: str) -> Iterator[None]:
    """Reports what fails on the way to a picture: it never loses a run."""
    try:
        yield
    except Exception as error:
        log.warning("%s could not be drawn: %s", what, line_of(error))

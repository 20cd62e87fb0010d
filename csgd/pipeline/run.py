"""One run, from its configuration to its verdict."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csgd import ranks
from csgd.folder import RunFolder
from csgd.pipeline.base import base
from csgd.pipeline.console import console
from csgd.pipeline.device import threads_of
from csgd.pipeline.foresee import foresee, levelled
from csgd.pipeline.header import tell_cut, tell_plan
from csgd.pipeline.launch import check_ranks, join_ranks, launch, started_first
from csgd.pipeline.leave import finished, leave
from csgd.pipeline.preview import preview
from csgd.pipeline.progress import Part, begin_or_resume, last_checkpoint
from csgd.pipeline.settle import settle
from csgd.pipeline.setup import prepare
from csgd.pipeline.spec import RunSpec
from csgd.pipeline.stage import begin, cut_stage, go_on_narrow, pull, resume
from csgd.pipeline.tune import tuned
from csgd.pipeline.watch import Watch
from csgd.verify import Verdict

if TYPE_CHECKING:
    from conf.schema import Config


def run(
    config: "Config", folder: Path, command: str | None = None, *, logs: Mapping[str, Any] | None = None
) -> Verdict | None:
    """Trains, prunes and judges as `config` says; leaves its files in `folder`.

    With plan_only it writes down what that would be, and there is no verdict.  With distributed.nproc it starts ranks,
    the first of which configures its logging as `logs` says; only that one writes.  `command` is told in the summary.
    """
    spec, where = RunSpec.of(config), RunFolder(Path(folder))
    check_ranks(spec.machine)
    lock = where.reserved() if started_first() else nullcontext()
    with lock, threads_of(spec.machine), join_ranks(spec.machine):
        spec = tuned(spec, config, where, lambda trial, path: _tried(trial, path, logs))
        if spec.machine.ranks > 1 and not spec.plan_only:
            return launch(_one_rank, (spec, where, command), spec.machine.ranks, logs)
        return _one_rank(spec, where, command)


def _tried(trial: "Config", path: Path, logs: Mapping[str, Any] | None) -> Verdict:
    """The verdict of a trial, which is not run again where it is finished and the run goes on.

    Of torchrun's ranks the first looks, as the others have no folder.
    """
    done = None
    if trial.resume == "auto":
        done = ranks.from_first(finished(trial, path, "resume=auto") if ranks.is_first() else None)
    return done or run(trial, path, logs=logs)


def _one_rank(spec: RunSpec, folder: RunFolder, command: str | None) -> Verdict | None:
    with join_ranks(spec.machine), console(spec.quiet):
        saved = last_checkpoint(spec, folder)
        setup = levelled(prepare(spec, saved and saved["facts"].get("widths")))
        plan = foresee(setup)
        if spec.plan_only:
            return preview(setup, plan, folder) if ranks.is_first() else None
        progress = begin_or_resume(setup, folder, saved, resume)
        with Watch(setup, plan, progress) as watch:
            if ranks.is_first():  # the folder is this run's from here on
                folder.clear(anew=progress.part is Part.BASE)
            tell_plan(setup, plan)
            if progress.part is Part.BASE:
                base(setup, progress, watch)
            if not setup.settled:
                setup, watch.plan = settle(setup, progress)
                tell_cut(watch.plan)
            while progress.stage < len(setup.widths):
                if progress.part is Part.BETWEEN:
                    begin(setup, progress, watch)
                if progress.part is Part.WIDE:
                    pull(setup, progress, watch)
                    cut_stage(setup, progress, watch)
                go_on_narrow(setup, progress, watch)
            return leave(setup, watch.plan, progress, watch.tracker, command)

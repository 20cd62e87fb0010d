"""Trials before a run: by which learning rate its network becomes narrow."""

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from csgd.errors import InputError, RateError, line_of
from csgd.folder import RunFolder
from csgd.pipeline.console import console, headline
from csgd.pipeline.launch import started_outside
from csgd.pipeline.spec import RunSpec, Trial
from csgd.verify import Verdict

if TYPE_CHECKING:
    from conf.schema import Config

log = logging.getLogger("csgd")


def tuned(spec: RunSpec, config: "Config", folder: RunFolder, run: Callable[["Config", Path], Verdict]) -> RunSpec:
    """The run with that rate of `tune.lr` whose trial scored highest on the images held out; of equal ones the first.

    run  (config, folder) → the verdict of a trial, which is a run of its own in trials/
    InputError if each of the rates lets the loss diverge, or is none to train with for another reason; what else ends a
    trial ends the run, as it says nothing of the rate.
    """
    if not config.tune.lr:
        return spec
    if spec.plan_only:
        count, lr = len(config.tune.lr), spec.pull.rates.lr
        headline.info(
            "tune.lr: the plan is without its %d trials, each a run as this one, at learning rate %g", count, lr
        )
        return spec
    with console(True, verdict=False) if spec.quiet else nullcontext():
        return _by_trials(spec, config, folder, run)


def _by_trials(spec: RunSpec, config: "Config", folder: RunFolder, run: Callable[["Config", Path], Verdict]) -> RunSpec:
    trials = []
    for lr in config.tune.lr:
        log.info("trial %d of %d: learning rate %g", len(trials) + 1, len(config.tune.lr), lr)
        trials.append(_tried(lr, config, folder.trial(f"lr_{lr:g}"), run))
    best = max(trials, key=lambda trial: -math.inf if math.isnan(trial.score) else trial.score)
    if math.isnan(best.score):
        raise InputError(f"tune.lr: no trial came to its end; {best.lr:g}: {best.failure}")
    log.info("learning rate %g, the best of %s", best.lr, ", ".join(f"{one.lr:g}: {one.score:.4f}" for one in trials))
    rates = replace(spec.pull.rates, lr=best.lr)
    return replace(spec, pull=replace(spec.pull, rates=rates), trials=tuple(trials))


def _tried(lr: float, config: "Config", folder: Path, run: Callable[["Config", Path], Verdict]) -> Trial:
    one = copy.deepcopy(config)
    one.schedule.csgd.lr, one.validation, one.tune.lr = lr, config.tune.held_out, []
    one.export, one.report, one.wandb.mode = None, False, "disabled"
    began, failure, score = time.perf_counter(), "", math.nan
    try:
        score = run(one, folder).accuracy
        failure = "its score is not a number" if math.isnan(score) else ""
    except RateError as error:
        if started_outside():  # the other ranks may be at another step, and this one cannot call them back
            raise InputError(f"tune.lr: {lr:g}: {line_of(error)}; with torchrun it must be left out") from None
        failure = line_of(error)
    if failure:
        log.warning("trial with learning rate %g: %s", lr, failure)
    return Trial(lr, score, time.perf_counter() - began, failure)

"""One stage: to its clusters, to its collapse, through its cut, and on as the narrow network."""

import logging
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor, nn

from csgd import ranks
from csgd.checkpoint import write_json
from csgd.clusters import Clusters
from csgd.data import Data
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.optim import CSGD
from csgd.pipeline.by_layer import deviations
from csgd.pipeline.device import as_trained
from csgd.pipeline.foresee import saving, stage_plan
from csgd.pipeline.learners import base_learner, free_learner, pulled_learner, saved_learner, uncalled_learner
from csgd.pipeline.progress import Checkpoint, Part, Progress, StageResult
from csgd.pipeline.setup import Setup, spaces_of
from csgd.pipeline.ship import keep
from csgd.pipeline.spec import CutSpec
from csgd.pipeline.watch import Watch
from csgd.pipeline.ways import WAYS, Way
from csgd.proof import Proof, prove
from csgd.train import Learner, measured, predict, score_of
from csgd.trim import merge_equal, trim
from csgd.verify import Verdict, deviation, statistics_spread, verdict, worst, worst_deviation

log = logging.getLogger("csgd")

LOOK_EVERY = 10  # steps between two looks at the deviation, once the cut is due
FORECAST_POINTS = 400  # per stage and group, for the picture


def begin(setup: Setup, progress: Progress, watch: Watch) -> None:
    """Clusters the filters of the network as it is, proves their cut, and gives the network a new optimizer.

    A rival of the pull chooses its channels instead, and is cut at once.
    """
    way = WAYS[setup.spec.cut.way]
    with progress.seconds.spent("cluster"):
        progress.spaces = spaces_again(setup)
        found = None
        if ranks.is_first():
            found = way.choose(setup, progress.spaces, setup.widths[progress.stage])
        progress.clusters = ranks.from_first(found)
        if way.proven:
            check_proof(setup, progress.spaces, progress.clusters)
    progress.pace = {}
    if way.pulls:
        progress.learner = pulled_learner(setup, progress.spaces, progress.clusters)
    else:
        progress.learner = uncalled_learner(setup)
    progress.plan = stage_plan(setup, groups_pulled(progress.learner), watch.plan.stage.strengths)
    progress.apart = deviations(setup.model, progress.spaces, progress.clusters)
    progress.start = {name: float(deviation) for name, deviation in progress.learner.deviations().items()}
    progress.part, progress.step = Part.WIDE, 0
    leave_clusters(progress)
    watch.keep_filters(setup, progress, "start")


def resume(setup: Setup, progress: Progress, saved: Checkpoint) -> None:
    """Makes the learner of the part that is under way as a checkpoint left it, and what is not saved."""
    if progress.part is Part.BETWEEN:
        return
    if progress.part is Part.BASE:
        progress.learner = base_learner(setup)
        progress.learner.load_state_dict(saved["state"])
        return
    spaces = None
    if progress.part is Part.WIDE:
        spaces = progress.spaces = spaces_again(setup)
    progress.learner = saved_learner(setup, saved["groups"], saved["state"], spaces, progress.clusters)
    pulled = [group for group in progress.learner.optimizer.param_groups if group["name"] in progress.start]
    progress.plan = stage_plan(setup, pulled, {group["name"]: group["centri_strength"] for group in pulled})
    leave_clusters(progress)


def spaces_again(setup: Setup) -> list[ChannelSpace]:
    """Those of the network as it is; what a trial finds is mostly known from before the cuts."""
    published = setup.spec.pull.published is not None
    return spaces_of(setup.model, setup.data.example, setup.finds_again, published)


def leave_clusters(progress: Progress) -> None:
    if ranks.is_first():
        write_json(progress.folder.clusters, progress.clusters)


def check_proof(setup: Setup, spaces: list[ChannelSpace], clusters: Clusters) -> Proof:
    """The proof of a cut with these clusters, told in the log; InputError, before training, where it fails."""
    proof = prove(setup.model, spaces, clusters, setup.data.example)
    log.info("proof of the cut, on a twin: %s", proof)
    if proof.failing:
        failing = "; ".join(f"{name}: {reason}" for name, reason in proof.failing.items())
        keep = ", ".join(f"'{name}'" for name in proof.failing)
        raise InputError(f"these clusters cannot be cut exactly ({failing}); deps.keep=[{keep}] leaves them whole")
    return proof


def pull(setup: Setup, progress: Progress, watch: Watch) -> None:
    """Trains the wide network until its filters have collapsed, or to the end of the stage."""
    if not WAYS[setup.spec.cut.way].pulls:
        return
    watch.starts(setup, progress)
    with progress.seconds.spent("csgd_wide"):
        for moment in progress.train(setup, setup.csgd, setup.spec.pull.train):
            late = moment.step - progress.plan.due
            looks = late >= 0 and late % LOOK_EVERY == 0  # slower than the forecast: float32, a mean of means
            if looks:
                progress.learner.share_buffers()
            done = looks and (moment.step == setup.csgd.steps or is_collapsed(setup, progress))
            watch.after(setup, progress, moment, tells=done)
            if done:
                break


def groups_pulled(learner: Learner) -> list[dict]:
    return learner.optimizer.clustered_groups() if isinstance(learner.optimizer, CSGD) else []


def is_collapsed(setup: Setup, progress: Progress) -> bool:
    """Whether every tensor that is to be merged has collapsed, running statistics and the average included; a Collapse
    knows, and the average, which lags, is merged after it."""
    if progress.learner.collapse:
        return progress.learner.collapse.done
    left = [worst_deviation(network, progress.spaces, progress.clusters) for network in networks_of(progress.learner)]
    return all(value <= setup.spec.cut.deviation for value in left)


def networks_of(learner: Learner) -> list:
    """The network, and the average of its weights if there is one, which then is what ships."""
    return [learner.model, learner.average.module] if learner.average else [learner.model]


def cut_stage(setup: Setup, progress: Progress, watch: Watch) -> None:
    """The cut, its verdict, and the learner that goes on as the narrow network."""
    learner, spec, way = progress.learner, setup.spec, WAYS[setup.spec.cut.way]
    with progress.seconds.spent("trim"):
        watch.keep_filters(setup, progress, "collapse")
        if learner.collapse and not learner.collapse.done:
            learner.collapse.detach()  # a scaler has left steps out, and there are no more: judged as it is
        elif learner.collapse and learner.average:
            merge_average(learner.average.module, progress.spaces, progress.clusters)
        apart = deviations(setup.model, progress.spaces, progress.clusters)
        judged, before, after = cut(learner, setup.data, progress.spaces, progress.clusters, spec.cut)
        watch.keep_filters(setup, progress, "cut")
        watch.keep_outputs(progress, before, after)
    progress.results.append(
        StageResult(
            widths=setup.widths[progress.stage],
            strengths=progress.plan.strengths,
            steps=setup.csgd.steps,
            cut_step=progress.step,
            foreseen_step=progress.plan.forecast.collapse_step,
            verdict=judged,
            curves=curves(progress, setup.csgd.steps),
            apart={name: (progress.apart.get(name, left), left) for name, left in apart.items()},
        )
    )
    tell_cut(judged, way, progress.step, setup.csgd.steps, spec.tested_on)
    progress.part = Part.NARROW
    if not way.pulls:
        progress.learner = free_learner(setup)
    progress.save(setup)
    if way.pulls:
        learner.network = as_trained(setup.model, spec.machine.compile)


def tell_cut(judged: Verdict, way: Way, step: int, steps: int, on: str) -> None:
    told = way.told if not way.pulls else "lossless" if judged.lossless else "NOT lossless"
    accuracies = judged.accuracy_before_trim, judged.accuracy_after_trim
    change = f"outputs moved by at most {judged.relative_logit_change:.1e} of an image's spread"
    log.info("CUT at step %d of %d, %s: %s; %s %.4f before, %.4f after", step, steps, told, change, on, *accuracies)


def merge_average(average: nn.Module, spaces: list[ChannelSpace], clusters: Clusters) -> None:
    """The last of the collapse: an average of the weights lags, and its members come together now.

    That changes what it says, as training does; its cut does not.
    """
    log.info("the moving average lags (relative deviation %.1e): merged", worst_deviation(average, spaces, clusters))
    merge_equal(average, spaces, clusters)


def cut(
    learner: Learner, data: Data, spaces: list[ChannelSpace], clusters: Clusters, spec: CutSpec
) -> tuple[Verdict, list[Tensor], list[Tensor]]:
    """Trims the model and the optimizer in place, and judges what that did to the outputs, which are those of the model
    on the test set before and after, on rank 0.

    The average of the weights is what ships, if there is one.  It is trimmed too, by its means: as it is linear in the
    weights, it goes on as the average of a run that was narrow from its start.  The worse of the two cuts counts, and
    the accuracies are the average's.
    """
    networks = networks_of(learner)
    wide = [predict(network, data) for network in networks]
    apart = [
        dict(
            deviation=deviation(network, spaces, clusters),
            relative_deviation=worst_deviation(network, spaces, clusters),
            statistics_spread=statistics_spread(network, spaces, clusters),
        )
        for network in networks
    ]
    if narrows := WAYS[spec.way].narrows:
        for network in networks:
            narrows(network, spaces, clusters)
    else:
        trim_pulled(learner, spaces, clusters, spec)
    how = dict(deviation_tolerance=spec.deviation, logit_tolerance=spec.logits, score=partial(score_of, data))
    narrow = [predict(network, data) for network in networks]
    if not ranks.is_first():
        return ranks.from_first(None), [], []
    verdicts = [
        verdict(before, after, labels, **measures, **how)
        for (before, labels), (after, _), measures in zip(wide, narrow, apart, strict=True)
    ]
    return ranks.from_first(worst(verdicts)), wide[0][0], narrow[0][0]


def trim_pulled(learner: Learner, spaces: list[ChannelSpace], clusters: Clusters, spec: CutSpec) -> None:
    model, optimizer = learner.model, learner.optimizer
    trim(model, spaces, clusters, optimizer, tolerance=None)
    learner.collapse = None
    if learner.average:
        merge_equal(learner.average.module, spaces, clusters)
        trim(learner.average.module, spaces, clusters, tolerance=None)
    if spec.then_plain and isinstance(optimizer, CSGD):  # steps of AdamW do not depend on the scale of gradients
        optimizer.unscale()


def curves(progress: Progress, steps: int) -> dict[str, list[tuple[int, float]]]:
    """What was forecast to be left of the deviation of each group, as (step, fraction)."""
    shown = range(1, steps + 1, max(1, steps // FORECAST_POINTS))
    return {group: [(step, progress.foreseen(group, step)) for step in shown] for group in progress.start}


def go_on_narrow(setup: Setup, progress: Progress, watch: Watch) -> None:
    """Takes the rest of the stage's steps with the narrow network, and ends with the average if there is one."""
    watch.starts(setup, progress)
    with progress.seconds.spent("csgd_trimmed"):
        for moment in progress.train(setup, setup.csgd, setup.spec.pull.train):
            watch.after(setup, progress, moment)
    if progress.learner.average:
        setup.model.load_state_dict(progress.learner.average.module.state_dict())
    result = progress.results[-1]
    judged = replace(result.verdict, accuracy=measured(setup.model, setup.data))
    progress.results[-1] = replace(result, verdict=judged)
    if ranks.is_first() and (number := progress.stage + 1) < len(setup.widths):
        cost = saving(watch.plan.costs[0], watch.plan.costs[number])
        so_far = worst([one.verdict for one in progress.results])
        keep(setup, progress.folder.between(number), widths=result.widths, verdict=asdict(so_far), cost=cost)
    progress.part, progress.stage, progress.step, progress.learner = Part.BETWEEN, progress.stage + 1, 0, None
    progress.save(setup)

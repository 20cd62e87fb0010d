"""What lies before a run, known before its first step."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from csgd.clusters import cluster
from csgd.errors import RateError
from csgd.pipeline.by_layer import of_modules, params_by_space
from csgd.pipeline.learners import csgd_optimizer, stop_of
from csgd.pipeline.setup import Setup
from csgd.pipeline.spec import timetable_of
from csgd.pipeline.ways import WAYS, sensitivity_passes
from csgd.plan import Collapsed, Plan, plan, plan_of_curve, strengths_by
from csgd.trim import cut, statistics_momentum
from csgd.verify import count_params, macs_by_module

log = logging.getLogger("csgd")


@dataclass(frozen=True)
class Cost:
    """layers  {space name: (MACs, parameters)} of the layers whose filters it holds; the whole network has more"""

    macs: int
    params: int
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, setup: Setup, widths: Mapping[str, int]) -> "Cost":
        """widths  {space name: now}"""
        by_module, spaces = macs_by_module(model, setup.data.example), setup.spaces
        macs = of_modules(model, spaces, widths, by_module)
        params = params_by_space(model, spaces, widths)
        layers = {name: (round(macs[name]), params[name]) for name in params}
        return cls(by_module[""], count_params(model), layers)

    def whole(self) -> dict[str, int]:
        return {"macs": self.macs, "params": self.params}


def saving(before: Cost, after: Cost) -> dict[str, int]:
    """As plain JSON."""
    costs = {"before": before.whole(), "after": after.whole()}
    return {f"{key}_{when}": cost[key] for when, cost in costs.items() for key in cost}


@dataclass(frozen=True)
class StagePlan:
    """What a stage will do to the deviation of each clustered group.

    strengths  ε of each, of the published pull;  due  the number of steps after which the stage can be cut
    """

    strengths: dict[str, float]
    forecast: Plan
    due: int


@dataclass(frozen=True)
class RunPlan:
    """costs  before the first stage and after each;  stage  the plan of the first"""

    costs: list[Cost]
    stage: StagePlan
    base_steps: int
    csgd_steps: int

    def layers(self, setup: Setup) -> list[dict[str, Any]]:
        """Every channel space with its MACs and parameters before the run and after it, as plain JSON."""
        before, after = self.costs[0].layers, self.costs[-1].layers
        pairs = [zip(before[layer["name"]], after[layer["name"]], strict=True) for layer in setup.layers]
        costs = (dict(zip(("macs", "params"), map(list, pair), strict=True)) for pair in pairs)
        return [layer | cost for layer, cost in zip(setup.layers, costs, strict=True)]

    def work(self, trains_base: bool) -> float:
        """What all steps cost together, in steps of the wide network."""
        return trains_base * self.base_steps + sum(self.stage_work(stage) for stage in range(len(self.costs) - 1))

    def stage_work(self, stage: int, step: int = 0, is_cut: bool = False) -> float:
        """What the steps of a stage (0, 1, …) cost from `step` on, if it is cut when it is due, or has been."""
        cut = step if is_cut else max(step, self.stage.due)
        return self.weight(stage) * (cut - step) + self.weight(stage + 1) * (self.csgd_steps - cut)

    def weight(self, cuts: int) -> float:
        """What a step costs after so many cuts, in steps of the wide network."""
        return self.costs[cuts].macs / self.costs[0].macs


def levelled(setup: Setup) -> Setup:
    """With as many steps for a rival of csgd as cost what csgd does, its base network and its choice included.

    Where widths go by sensitivity, all measure it but those without a base network, which take the steps instead.
    """
    spec, way, per_epoch = setup.spec, WAYS[setup.spec.cut.way], setup.data.steps_per_epoch
    if way.pulls or not spec.cut.equal_cost:
        return setup
    its = timetable_of(spec.pull.rates, per_epoch, spec.pull)
    pulled = foresee(replace(setup, csgd=its, spec=replace(spec, cut=replace(spec.cut, way="csgd"))))
    stages = range(len(setup.widths))
    chosen = sum(pulled.weight(stage) for stage in stages) * (WAYS["csgd"].passes(setup) - way.passes(setup))
    chosen += 0.0 if way.trained else sensitivity_passes(setup)
    work = pulled.work(trains_base=not way.trained) + chosen
    steps = round(work / sum(pulled.weight(stage + 1) for stage in stages))
    return replace(setup, csgd=timetable_of(spec.pull.rates, per_epoch, length=max(1, steps)))


def foresee(setup: Setup) -> RunPlan:
    """RateError if a strength diverges, or if no stable one collapses the filters in time.

    It needs no weights: what will not do is said before the base network is trained.
    """
    model, spaces = setup.model, setup.spaces
    groups = []
    if setup.spec.pull.published and WAYS[setup.spec.cut.way].pulls:
        clusters = cluster(model, spaces, setup.widths[0], "even")
        groups = csgd_optimizer(setup.spec, model, spaces, clusters).clustered_groups()
    stage = stage_plan(setup, groups)
    base_steps = setup.base.steps if WAYS[setup.spec.cut.way].trained else 0
    return RunPlan(_costs(setup), stage, base_steps, setup.csgd.steps)


def stage_plan(setup: Setup, groups: list[dict], solved: Mapping[str, float] | None = None) -> StagePlan:
    """The plan of a stage with these clustered groups, whose strengths are set where they are to be found first.

    solved  the strengths of an earlier stage, which do for all: a forecast knows neither weights nor clusters
    """
    cut_spec, pull, timetable = setup.spec.cut, setup.spec.pull, setup.csgd
    if not WAYS[cut_spec.way].pulls:
        return StagePlan({}, Plan({}, cut_spec.deviation, stop=0), 0)
    if pull.published is None:
        stop = stop_of(setup)
        forecast = plan_of_curve(pull.curve, stop, timetable.steps, cut_spec.deviation)
        return StagePlan({}, forecast, stop if cut_spec.at_collapse else timetable.steps)
    momenta = statistics_momentum(setup.model), 1 - pull.average if pull.average else None
    collapsed = Collapsed(cut_spec.deviation, min((m for m in momenta if m is not None), default=None))
    if pull.published.strength is None:
        if not solved or any(group["name"] not in solved for group in groups):
            solved = _solved(setup, groups, collapsed)
        for group in groups:
            group["centri_strength"] = solved[group["name"]]
    strengths, forecast = {g["name"]: g["centri_strength"] for g in groups}, plan(groups, timetable, collapsed)
    due = (forecast.collapse_step if cut_spec.at_collapse else None) or timetable.steps
    return StagePlan(strengths, forecast, due)


def _solved(setup: Setup, groups: list[dict], collapsed: Collapsed) -> dict[str, float]:
    by, steps = setup.spec.pull.collapse_by, setup.csgd.steps
    solved = strengths_by(groups, setup.csgd, collapsed, round(by * steps))
    if None in solved.values():
        raise RateError(
            f"centri_strength=auto: no stable strength collapses the filters within {round(by * steps)} of {steps} "
            f"steps; a larger collapse_by than {by:g}, schedule.csgd.epochs or schedule.csgd.lr would, and "
            "centri_strength=null does in any number of steps"
        )
    return solved


def _costs(setup: Setup) -> list[Cost]:
    """Which filters are in which cluster does not matter for them."""
    costs = [Cost.of(setup.model, setup, {})]
    for widths in setup.widths:
        twin = copy.deepcopy(setup.model)
        cut(twin, setup.spaces, cluster(twin, setup.spaces, widths, "even"))
        costs.append(Cost.of(twin, setup, widths))
    return costs


def tell_forecast(planned: StagePlan) -> None:
    if planned.strengths:
        strengths = ", ".join(f"{value:.4g} on {name}" for name, value in planned.strengths.items())
        log.info("centripetal strength: %s", strengths)
    log.info("%s", planned.forecast.describe())
    if planned.forecast.warning:
        log.warning("%s", planned.forecast.warning)

"""What a run says before it trains: what can be cut, and what that saves and takes."""

import logging

from csgd.folders import listed
from csgd.pipeline.foresee import Cost, RunPlan, tell_forecast
from csgd.pipeline.setup import Setup
from csgd.pipeline.ways import WAYS

log = logging.getLogger("csgd")


def tell_plan(setup: Setup, plan: RunPlan) -> None:
    """The spaces, those that stay whole by their reason; the steps; the forecast."""
    pinned = [space for space in setup.spaces if space.pinned]
    log.info("channel spaces: %d free, %d stay whole", len(setup.spaces) - len(pinned), len(pinned))
    reasons = {}
    for space in pinned:
        reasons.setdefault("; ".join(space.pinned), []).append(space.name)
    for reason, names in reasons.items():
        log.info("  %s: %s", listed(names), reason)
    tell_cut(plan)
    way, stages = WAYS[setup.spec.cut.way], len(setup.widths)
    told = f"{plan.csgd_steps} steps" if stages == 1 else f"{stages} times {plan.csgd_steps} steps"
    kind = "of C-SGD" if way.pulls else f"of the narrow network ({way.told})"
    log.info("training: %d steps of the base network, %s %s", plan.base_steps, told, kind)
    tell_forecast(plan.stage)


def tell_cut(plan: RunPlan) -> None:
    before, after = plan.costs[0], plan.costs[-1]
    log.info("cut: %.1f%% of the multiply-accumulates, %.1f%% of the parameters", *_saved(before, after))


def _saved(before: Cost, after: Cost) -> tuple[float, float]:
    return 100 * (1 - after.macs / before.macs), 100 * (1 - after.params / before.params)

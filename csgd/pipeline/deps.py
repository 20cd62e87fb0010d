"""The widths of each stage, as `deps` say: fractions, widths, or what meets a budget."""

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from csgd import ranks, report
from csgd.budget import Budget, Sensitivity, budget_widths, least_cost
from csgd.errors import InputError
from csgd.graph import ChannelSpace
from csgd.pipeline.by_layer import IMAGES
from csgd.widths import target_widths

if TYPE_CHECKING:
    from conf.schema import Deps

log = logging.getLogger("csgd")

COSTS = {"macs": "multiply-accumulates", "params": "parameters", "latency": f"latency of {IMAGES} images"}


def stages_of(deps: "Deps", spaces: list[ChannelSpace], model: nn.Module, example: Tensor) -> list[dict[str, int]]:
    """The widths of each stage: those of deps, those that meet its budget, or deps.stages of those at the start.

    A budget is allotted evenly, as far as it is to go by the weights of the base network, which come later.
    """
    options = options_of(deps)
    if deps.stages is not None:
        stages = []
        for fraction in deps.stages:
            stages.append(target_widths(spaces, fraction, after=stages[-1] if stages else None, **options))
    elif wish_of(deps):
        if ranks.is_first():
            tell_reach(deps, spaces, model, example)
        stages = [met(deps, spaces, model, example).widths]
    elif deps.widths is not None:
        stages = [target_widths(spaces, deps.widths, **options)]
    elif deps.layers:
        stages = [target_widths(spaces, deps.layers, rest=deps.fraction, **options)]
    else:
        stages = [target_widths(spaces, deps.fraction, **options)]
    check_narrower(spaces, stages)
    return stages


def check_narrower(spaces: list[ChannelSpace], stages: list[dict[str, int]]) -> None:
    if all(stages[0].get(space.name, space.size) == space.size for space in spaces):
        raise InputError("deps: nothing is left to trim, every layer keeps its width")


def options_of(deps: "Deps") -> dict[str, Any]:
    return dict(min_width=deps.min_width, round_to=deps.round_to, keep=deps.keep)


def wish_of(deps: "Deps") -> dict[str, float]:
    """Its budget, {macs, params or latency: the fraction that is left at most}; empty if it has none."""
    return {key: value for key in COSTS if (value := getattr(deps, key)) is not None}


def met(
    deps: "Deps", spaces: list[ChannelSpace], model: nn.Module, example: Tensor, known: Sensitivity | None = None
) -> Budget:
    """The widths that meet the budget of deps, allotted evenly, or by the sensitivity that is known.

    Latencies are measured by the first rank.  InputError names the key that cannot be met.
    """
    ((what, wish),) = wish_of(deps).items()

    def found() -> Budget:
        try:
            how = {what: wish, "sensitivity": known} | options_of(deps)
            return budget_widths(model, spaces, _batch(example), **how)
        except InputError as error:
            raise InputError(f"deps.{what}={wish:g}: {error}") from None

    budget = found() if what != "latency" else ranks.from_first(found() if ranks.is_first() else None)
    up_to = budget.threshold
    how = "" if up_to is None else f", layers narrowed up to a change of the loss by {up_to:.2g}"
    log.info("budget: deps.%s=%g is met with %.4f%s", what, wish, budget.cost, how)
    return budget


def tell_reach(deps: "Deps", spaces: list[ChannelSpace], model: nn.Module, example: Tensor) -> None:
    """What can be reached, and whether the wish can be met, as a table."""
    ((what, wish),) = wish_of(deps).items()
    rows = []
    for key in COSTS:
        if key == what or key != "latency":  # which takes its time
            least = least_cost(model, spaces, _batch(example), key, **options_of(deps))
            met = (f"{wish:g}", "yes" if least <= wish else "no") if key == what else ("", "")
            rows.append((COSTS[key], f"{least:.4f}", "1", *met))
    header = ("of the dense network's", "least", "most", f"deps.{what}", "can be met")
    log.info("what can be reached\n\n%s\n", report.table(header, rows))


def _batch(example: Tensor) -> Tensor:
    """IMAGES images, whose number a latency depends on."""
    return example[[i % len(example) for i in range(IMAGES)]]

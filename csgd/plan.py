"""What a run will do to the deviation, known before its first batch (facts F2, F4 to F6, F8)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from csgd.centripetal import collapse_step, forecast, lengthening, strength_to_collapse
from csgd.collapse import CURVES
from csgd.errors import InputError
from csgd.optim import check_stability
from csgd.schedule import Timetable

COLLAPSED = "filters"  # the name of what a Collapse makes equal, beside those of CSGD's groups: kernels, vectors
FORGETFUL = "batch norm with a momentum, as momentum=0.1, in place of an average over all batches (momentum=None)"


@dataclass(frozen=True)
class Collapsed:
    """What counts as collapsed.

    tolerance            a factor of the deviation
    statistics_momentum  of the slowest running mean of what is pulled (batch norm's statistics, an average of the
                         weights): None if there is none, 0 if one forgets nothing
    """

    tolerance: float
    statistics_momentum: float | None = None


@dataclass(frozen=True)
class Plan:
    """The forecast of a run.

    factors  {group name: [a_t after each step]}: what is left of every deviation of the group
    advice   what would make it collapse, if it does not
    floor    where parameters of 16 bits stop: their rounding swallows what is left of the pull
    stop     the step after which a Collapse leaves members equal, whatever the tolerance is
    """

    factors: dict[str, list[float]]
    tolerance: float
    statistics_momentum: float | None = None
    advice: str | None = None
    floor: float = 0.0
    stop: int | None = None

    @property
    def left(self) -> float:
        """The largest factor at the end of the run, or the floor."""
        return max([self.floor, *(abs(factors[-1]) for factors in self.factors.values())])

    @property
    def collapses(self) -> bool:
        return self.left <= self.tolerance

    @property
    def collapse_step(self) -> int | None:
        """The number of steps after which every group is collapsed and stays so; None if that is not within the run."""
        if self.stop is not None:
            return self.stop
        steps = [collapse_step(f, self.tolerance, self.statistics_momentum) for f in self.factors.values()]
        return None if None in steps or not steps or self.floor > self.tolerance else max(steps)

    @property
    def warning(self) -> str | None:
        """One line where the cut will not be lossless, and what would make it so."""
        if not self.collapses:
            return (
                f"the filters will not collapse: {self.left:.1e} of their deviation is left at the end, the cut needs "
                f"{self.tolerance:.0e} and will not be lossless; {self.advice} would do"
            )
        if self.factors and self.collapse_step is None and self.statistics_momentum is not None:
            if self.statistics_momentum == 0:
                lag, way = "which average over all batches and forget none, never do", FORGETFUL
            else:
                lag = f"which follow them with a momentum of {self.statistics_momentum:g}, not before the end"
                way = "a stronger pull or more epochs"
            return (
                f"the filters will collapse, but the running means of batch norm or of schedule.ema, {lag}: "
                f"the cut will not be lossless; {way} would do"
            )
        return None

    def describe(self) -> str:
        if not self.factors:
            return "nothing is pulled: the cut comes before the first step"
        if self.stop is not None:
            return f"the filters of a cluster will be equal, to the bit, at step {self.stop}"
        parts = ", ".join(f"{name} to {abs(factors[-1]):.1e}" for name, factors in self.factors.items())
        when = f", collapsed at step {self.collapse_step}" if self.collapse_step else ""
        stop = f"; 16 bits round the pull away at about {self.floor:.0e}" if self.floor > self.tolerance else ""
        return f"forecast: the deviation will have shrunk at the end ({parts} of its start){when}{stop}"


def plan_of_curve(curve: str, stop: int, steps: int, tolerance: float) -> Plan:
    """The forecast of a Collapse, which takes every deviation along its curve (fact F11)."""
    left = [CURVES[curve](step / stop) if step < stop else 0.0 for step in range(1, steps + 1)]
    return Plan({COLLAPSED: left}, tolerance, stop=stop)


@dataclass(frozen=True)
class _Recurrence:
    """What fact F2 needs to know of one parameter group: its strength and its constants.

    resolution  the largest eps of its parameters of 16 bits, 0 where there are none
    """

    name: str
    strength: float
    rates: list[float]
    ramp: Sequence[float]
    constants: dict[str, Any]
    resolution: float = 0.0

    @classmethod
    def of(cls, group: dict, timetable: Timetable) -> "_Recurrence":
        constants = {key: group[key] for key in ("weight_decay", "momentum", "nesterov")}
        rates = [rate * group["lr_factor"] for rate in timetable.learning_rates]
        coarse = [torch.finfo(p.dtype).eps for p in group["params"] if p.is_floating_point() and p.element_size() < 4]
        ramp = timetable.ramp or [1.0] * timetable.steps
        return cls(group["name"], group["centri_strength"], rates, ramp, constants, max(coarse, default=0.0))

    def factors(self) -> list[float]:
        return forecast(self.rates, [self.strength * r for r in self.ramp], **self.constants)

    def floor(self) -> float:
        """About where the deviation stops, of the weights: once τ(η+ε)/(1−μ) V is below a quarter of their eps.

        Only in 16 bits: in float32 the steps of the gradients are far above the resolution, and carry the pull along.
        """
        if not self.resolution:
            return 0.0
        decay, inertia = self.constants["weight_decay"], 1 - self.constants["momentum"]
        paces = [rate * (decay + self.strength * r) / inertia for rate, r in zip(self.rates, self.ramp, strict=True)]
        stops = [self.resolution / (4 * min(1.0, pace)) if pace else math.inf for pace in paces]
        return min((max(abs(a), stop) for a, stop in zip(self.factors(), stops, strict=True)), default=math.inf)

    def check(self) -> None:
        fastest = max(zip(self.rates, self.ramp, strict=True), key=lambda pair: pair[0] * pair[1], default=(0.0, 0.0))
        check_stability(fastest[0], self.strength * fastest[1], **self.constants)

    def needed(self, collapsed: Collapsed, within: int | None = None) -> float | None:
        return strength_to_collapse(
            self.rates,
            collapsed.tolerance,
            **self.constants,
            ramp=self.ramp,
            within=within,
            statistics_momentum=collapsed.statistics_momentum or None,
        )


def plan(groups: Sequence[dict], timetable: Timetable, collapsed: Collapsed) -> Plan:
    """Forecasts what a run does to the clustered parameter groups of a CSGD; InputError where it diverges (F6)."""
    recurrences = [_Recurrence.of(group, timetable) for group in groups]
    for recurrence in recurrences:
        recurrence.check()
    factors = {r.name: r.factors() for r in recurrences}
    floor = max((r.floor() for r in recurrences), default=0.0)
    foreseen = Plan(factors, collapsed.tolerance, collapsed.statistics_momentum, floor=floor)
    return foreseen if foreseen.collapses else replace(foreseen, advice=_advice(foreseen, recurrences, collapsed))


def strengths_by(
    groups: Sequence[dict], timetable: Timetable, collapsed: Collapsed, within: int
) -> dict[str, float | None]:
    """The smallest strength of each group that collapses within `within` steps, None where no stable one does (F4).

    InputError where running statistics forget nothing: no strength brings these together.
    """
    if collapsed.statistics_momentum == 0:
        raise InputError(
            f"no strength makes running statistics collapse that average over all batches: use {FORGETFUL}"
        )
    return {group["name"]: _Recurrence.of(group, timetable).needed(collapsed, within) for group in groups}


def _advice(foreseen: Plan, recurrences: list[_Recurrence], collapsed: Collapsed) -> str:
    """A strength that does for kernels and vectors alike, with vector_ratio as it is or else 1; or more epochs."""
    if foreseen.floor > foreseen.tolerance:
        return "float32 parameters (autocast keeps them)"
    strongest, ways = max(r.strength for r in recurrences), []
    needed = [r.needed(collapsed) for r in recurrences]
    for ratios, also in (
        ([r.strength / strongest if strongest else 0.0 for r in recurrences], ""),
        ([1.0] * len(recurrences), " with a vector_ratio of 1"),
    ):
        if None in needed or not all(ratios):
            continue
        strength = max(n / ratio for n, ratio in zip(needed, ratios, strict=True))
        stronger = [replace(r, strength=strength * ratio) for r, ratio in zip(recurrences, ratios, strict=True)]
        if all(abs(r.factors()[-1]) <= collapsed.tolerance for r in stronger):  # too strong a pull diverges
            ways.append(f"a centri_strength of {_round_up(strength)}{also}")
            break
    longer = max(lengthening(factors[-1], foreseen.tolerance) for factors in foreseen.factors.values())
    if math.isfinite(longer):
        ways.append(f"{math.ceil(longer * 10) / 10:.1f} times as many epochs")
    return " or ".join(ways) or "a lower learning rate and many more epochs"


def _round_up(value: float) -> str:
    """Three digits, never less than the value: what is advised has to do."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit) * unit:.3g}"

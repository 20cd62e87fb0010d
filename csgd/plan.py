"""What a run will do to the deviation, known before its first batch (facts F2, F4 to F6, F8)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from csgd.centripetal import collapse_step, forecast, lengthening, strength_to_collapse
from csgd.optim import check_stability


@dataclass(frozen=True)
class Timetable:
    """What happens to the pull, step by step, and what counts as collapsed.

    learning_rates       τ of each step
    ramp                 factor of ε at each step
    tolerance            a factor of the deviation that counts as collapsed
    statistics_momentum  of batch norm, None if the network has no running statistics
    """

    learning_rates: Sequence[float]
    ramp: Sequence[float]
    tolerance: float
    statistics_momentum: float | None = None


@dataclass(frozen=True)
class Plan:
    """The forecast of a run.

    factors  {group name: [a_t after each step]}: what is left of every deviation of the group
    advice   what would make it collapse, if it does not
    """

    factors: dict[str, list[float]]
    tolerance: float
    statistics_momentum: float | None = None
    advice: str | None = None

    @property
    def left(self) -> float:
        """The largest factor at the end of the run."""
        return max((abs(factors[-1]) for factors in self.factors.values()), default=0.0)

    @property
    def collapses(self) -> bool:
        return self.left <= self.tolerance

    @property
    def collapse_step(self) -> int | None:
        """The number of steps after which every group is collapsed and stays so; None if that is not within the run."""
        steps = [collapse_step(f, self.tolerance, self.statistics_momentum) for f in self.factors.values()]
        return None if None in steps or not steps else max(steps)

    def describe(self) -> str:
        parts = ", ".join(f"{name} to {abs(factors[-1]):.1e}" for name, factors in self.factors.items())
        when = f", collapsed at step {self.collapse_step}" if self.collapse_step else ""
        return f"forecast: the deviation will have shrunk at the end ({parts} of its start){when}"


@dataclass(frozen=True)
class _Recurrence:
    """What fact F2 needs to know of one parameter group: its strength and its constants."""

    name: str
    strength: float
    rates: list[float]
    ramp: Sequence[float]
    constants: dict[str, Any]

    @classmethod
    def of(cls, group: dict, timetable: Timetable) -> "_Recurrence":
        constants = {key: group[key] for key in ("weight_decay", "momentum", "nesterov")}
        rates = [rate * group["lr_factor"] for rate in timetable.learning_rates]
        return cls(group["name"], group["centri_strength"], rates, timetable.ramp, constants)

    def factors(self) -> list[float]:
        return forecast(self.rates, [self.strength * r for r in self.ramp], **self.constants)

    def check(self) -> None:
        fastest = max(zip(self.rates, self.ramp, strict=True), key=lambda pair: pair[0] * pair[1], default=(0.0, 0.0))
        check_stability(fastest[0], self.strength * fastest[1], **self.constants)

    def needed(self, timetable: Timetable, within: int | None = None) -> float | None:
        return strength_to_collapse(
            self.rates,
            timetable.tolerance,
            **self.constants,
            ramp=self.ramp,
            within=within,
            statistics_momentum=timetable.statistics_momentum,
        )


def plan(groups: Sequence[dict], timetable: Timetable) -> Plan:
    """Forecasts what a run does to the clustered parameter groups of a CSGD; InputError where it diverges (F6)."""
    recurrences = [_Recurrence.of(group, timetable) for group in groups]
    for recurrence in recurrences:
        recurrence.check()
    factors = {r.name: r.factors() for r in recurrences}
    ahead = Plan(factors, timetable.tolerance, timetable.statistics_momentum)
    return ahead if ahead.collapses else replace(ahead, advice=_advice(ahead, recurrences, timetable))


def strengths_by(groups: Sequence[dict], timetable: Timetable, within: int) -> dict[str, float | None]:
    """The smallest strength of each group that collapses within `within` steps, None where no stable one does (F4)."""
    return {group["name"]: _Recurrence.of(group, timetable).needed(timetable, within) for group in groups}


def _advice(ahead: Plan, recurrences: list[_Recurrence], timetable: Timetable) -> str:
    """A strength that does for kernels and vectors alike, with vector_ratio as it is or else 1; or more epochs."""
    strongest, ways = max(r.strength for r in recurrences), []
    needed = [r.needed(timetable) for r in recurrences]
    for ratios, also in (
        ([r.strength / strongest if strongest else 0.0 for r in recurrences], ""),
        ([1.0] * len(recurrences), " with a vector_ratio of 1"),
    ):
        if None in needed or not all(ratios):
            continue
        strength = max(n / ratio for n, ratio in zip(needed, ratios, strict=True))
        stronger = [replace(r, strength=strength * ratio) for r, ratio in zip(recurrences, ratios, strict=True)]
        if all(abs(r.factors()[-1]) <= timetable.tolerance for r in stronger):  # too strong a pull diverges
            ways.append(f"a centri_strength of {_round_up(strength)}{also}")
            break
    longer = max(lengthening(factors[-1], ahead.tolerance) for factors in ahead.factors.values())
    if math.isfinite(longer):
        ways.append(f"{math.ceil(longer * 10) / 10:.1f} times as many epochs")
    return " or ".join(ways) or "a lower learning rate and many more epochs"


def _round_up(value: float) -> str:
    """Three digits, never less than the value: what is advised has to do."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit) * unit:.3g}"

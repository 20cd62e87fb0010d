"""What a run will do to the deviation, known before its first batch (facts F2, F4 to F6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from csgd.centripetal import forecast, lengthening, stability_limit, strength_to_collapse
from csgd.optim import CSGD, check_stability


@dataclass(frozen=True)
class Plan:
    """The forecast of a run.

    factors    {group name: [a_t after each step]}: what is left of every deviation of the group
    tolerance  a factor at the end of the run that counts as collapsed
    momentum   of the running statistics of batch norm, None if there are none
    advice     what would make it collapse, if it does not
    """

    factors: dict[str, list[float]]
    tolerance: float
    momentum: float | None = None
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
        """The number of steps after which every factor stays within the tolerance, and so does its running mean, as
        which the statistics of batch norm lag the filters (fact F8); None if that is not within the run."""
        last = 0
        for factors in self.factors.values():
            lagging = 1.0
            for step, factor in enumerate(map(abs, factors), 1):
                if self.momentum is not None:
                    lagging += self.momentum * (factor - lagging)
                    factor = max(factor, lagging)
                if factor > self.tolerance:
                    last = max(last, step)
        return last + 1 if last < max(map(len, self.factors.values()), default=0) else None

    def describe(self) -> str:
        parts = ", ".join(f"{name} to {abs(factors[-1]):.1e}" for name, factors in self.factors.items())
        return f"forecast: the deviation will have shrunk at the end ({parts} of its start)"


@dataclass(frozen=True)
class _Recurrence:
    """What fact F2 needs to know of one parameter group: its strength and its constants."""

    name: str
    strength: float
    rates: list[float]
    constants: dict[str, float]

    @classmethod
    def of(cls, group: dict, learning_rates: Sequence[float]) -> "_Recurrence":
        constants = {key: group[key] for key in ("weight_decay", "momentum", "nesterov")}
        rates = [rate * group["lr_factor"] for rate in learning_rates]
        return cls(group["name"], group["centri_strength"], rates, constants)

    def factors(self) -> list[float]:
        return forecast(self.rates, self.strength, **self.constants)

    def collapses(self, tolerance: float) -> bool:
        limit = stability_limit(self.constants["momentum"], self.constants["nesterov"])
        stable = max(self.rates) * (self.constants["weight_decay"] + self.strength) < limit
        return stable and abs(self.factors()[-1]) <= tolerance


def plan(
    optimizer: CSGD, learning_rates: Sequence[float], tolerance: float, statistics_momentum: float | None = None
) -> Plan:
    """Forecasts a run of `optimizer` under a schedule of learning rates; InputError where it diverges (F6)."""
    recurrences = [_Recurrence.of(group, learning_rates) for group in optimizer.clustered_groups()]
    for r in recurrences:
        check_stability(max(r.rates), r.strength, **r.constants)
    ahead = Plan({r.name: r.factors() for r in recurrences}, tolerance, statistics_momentum)
    return ahead if ahead.collapses else replace(ahead, advice=_advice(ahead, recurrences))


def _advice(ahead: Plan, recurrences: list[_Recurrence]) -> str:
    """A strength that does for kernels and vectors alike, with vector_ratio as it is or else 1; or more epochs."""
    strongest, ways = max(r.strength for r in recurrences), []
    for ratios, also in (
        ([r.strength / strongest if strongest else 0.0 for r in recurrences], ""),
        ([1.0] * len(recurrences), " with a vector_ratio of 1"),
    ):
        needed = [strength_to_collapse(r.rates, ahead.tolerance, **r.constants) for r in recurrences]
        if None in needed or not all(ratios):
            continue
        strength = max(n / ratio for n, ratio in zip(needed, ratios, strict=True))
        stronger = [replace(r, strength=strength * ratio) for r, ratio in zip(recurrences, ratios, strict=True)]
        if all(r.collapses(ahead.tolerance) for r in stronger):
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

"""What a run will do to the deviation, known before its first batch (facts F2, F4 to F6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from csgd.centripetal import forecast, lengthening, strength_to_collapse
from csgd.optim import CSGD, check_stability


@dataclass(frozen=True)
class Plan:
    """The forecast of a run.

    factors    {group name: [a_t after each step]}: what is left of every deviation of the group
    tolerance  a factor at the end of the run that counts as collapsed
    advice     what would make it collapse, if it does not
    """

    factors: dict[str, list[float]]
    tolerance: float
    advice: str | None

    @property
    def left(self) -> float:
        """The largest factor at the end of the run."""
        return max((abs(factors[-1]) for factors in self.factors.values()), default=0.0)

    @property
    def collapses(self) -> bool:
        return self.left <= self.tolerance

    def describe(self) -> str:
        parts = ", ".join(f"{name} to {abs(factors[-1]):.1e}" for name, factors in self.factors.items())
        return f"forecast: the deviation will have shrunk at the end ({parts} of its start)"


def plan(optimizer: CSGD, learning_rates: Sequence[float], tolerance: float) -> Plan:
    """Forecasts a run of `optimizer` under a schedule of learning rates; InputError where it diverges (F6)."""
    factors, needed, longer = {}, [], 1.0
    strengths = [group["centri_strength"] for group in optimizer.clustered_groups()]
    for group in optimizer.clustered_groups():
        rates = [rate * group["lr_factor"] for rate in learning_rates]
        inertia = dict(weight_decay=group["weight_decay"], momentum=group["momentum"], nesterov=group["nesterov"])
        check_stability(max(rates), group["centri_strength"], **inertia)
        factors[group["name"]] = forecast(rates, group["centri_strength"], **inertia)
        ratio = group["centri_strength"] / max(strengths) if max(strengths) else 1.0
        wanted = strength_to_collapse(rates, tolerance, **inertia) if ratio else None
        needed.append(math.inf if wanted is None else wanted / ratio)
        longer = max(longer, lengthening(factors[group["name"]][-1], tolerance))
    strength = max(needed, default=0.0)
    ways = [f"a centri_strength of {strength:.3g}"] if math.isfinite(strength) else []
    ways += [f"{longer:.1f} times as many epochs"] if math.isfinite(longer) else []
    result = Plan(factors, tolerance, None)
    return result if result.collapses else Plan(factors, tolerance, " or ".join(ways) or "a centri_strength above 0")

"""Learning rates as pure functions of the step, and the timetable of a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi


@dataclass(frozen=True)
class Timetable:
    """Every step of a training: what is trained by, and what is forecast from.

    learning_rates  τ of each step
    ramp            factor of ε at each step; None: 1 at all of them
    epochs_before   those of the run that came before, whose order and augmentation of the images are not drawn again
    """

    steps_per_epoch: int
    learning_rates: Sequence[float]
    ramp: Sequence[float] | None = None
    epochs_before: int = 0

    @property
    def steps(self) -> int:
        return len(self.learning_rates)


def learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    lr: float,
    warmup_epochs: float = 0.0,
    decay: str = "cosine",
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Learning rate τ of step 0, 1, … of a run of epochs × steps_per_epoch steps.

    A linear warm-up, then cosine: to 0 at the end; step: × gamma at each milestone (in epochs); constant.
    """
    warmup, total = round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
    if step < warmup:
        return lr * (step + 1) / warmup
    if decay == "cosine":
        return lr * 0.5 * (1 + cos(pi * (step - warmup) / max(1, total - warmup)))
    if decay == "step":
        return lr * gamma ** sum(step >= milestone * steps_per_epoch for milestone in milestones)
    if decay == "constant":
        return lr
    raise ValueError(f"decay must be cosine, step or constant, got {decay!r}")


RAMPS = {
    "constant": lambda x: 1.0,
    "linear": lambda x: x,
    "quadratic": lambda x: x * x,
    "cosine": lambda x: (1 - cos(pi * x)) / 2,
}


def ramp(step: int, *, length: int, shape: str = "constant") -> float:
    """The factor of the centripetal strength at step 0, 1, …: rises to 1 over `length` steps, and stays there.

    x = (step + 1) / length:  linear x,  quadratic x²,  cosine (1 − cos πx) / 2,  constant 1.
    """
    if shape not in RAMPS:
        raise ValueError(f"a ramp must be one of {', '.join(RAMPS)}, got {shape!r}")
    return RAMPS[shape](min(1.0, (step + 1) / max(1, length)))

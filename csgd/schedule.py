"""Learning rates as pure functions of the step."""

from collections.abc import Sequence
from math import cos, pi


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

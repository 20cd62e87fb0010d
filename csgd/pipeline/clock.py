"""When a run will end: the bar of a phase, and the time that the steps still to come will take."""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from tqdm import tqdm


def bar_of(cfg: Any, label: str, steps: range) -> tqdm:
    """The bar of a phase over all of its steps, of which those before `steps` are done; none without a terminal."""
    shown = cfg.progress and not cfg.quiet
    where = dict(total=steps.stop, initial=steps.start, unit=" steps")
    return tqdm(desc=label, **where, leave=False, disable=None if shown else True)


class Clock:
    """The steps of a run from its first to its last, each at what it costs, and the seconds they have taken so far.

    parts  [(steps, cost of one)] in the order in which they are taken: base, wide, trimmed, wide, …; the cost in
           multiply-accumulates of the network that takes them, relative to the first
    """

    def __init__(self, parts: Sequence[tuple[int, float]]):
        self.parts = parts
        self._position, self._mark = 0, time.perf_counter()
        self._seconds, self._work = 0.0, 0.0

    def start(self, position: int) -> None:
        """Goes on measuring, at this step of the run: what came before took no time, or none that counts."""
        self._position, self._mark = position, time.perf_counter()

    def tick(self, position: int) -> None:
        """The run has come from where it was to this step."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._work += self.work(self._position, position)
        self._position, self._mark = position, now

    @property
    def seconds_left(self) -> float:
        """What the rest will take at the pace so far, tests of the network included."""
        ahead = self.work(self._position, sum(steps for steps, _ in self.parts))
        return ahead * self._seconds / self._work if self._work else float("nan")

    def ends(self) -> str:
        """The run's end as the time of day."""
        at = datetime.now() + timedelta(seconds=self.seconds_left)
        return f"run ends {at:%H:%M}" if self.seconds_left < 24 * 3600 else f"run ends {at:%a %H:%M}"

    def work(self, start: int, stop: int) -> float:
        """What the steps from `start` to `stop` cost together, in steps of the first network."""
        total, first = 0.0, 0
        for steps, cost in self.parts:
            total += cost * max(0, min(stop, first + steps) - max(start, first))
            first += steps
        return total

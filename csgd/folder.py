"""The folder of a run: what lies where in it, who is at work in it, and how far that came."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from csgd.errors import InputError
from csgd.pruned import DESCRIPTION, WEIGHTS


class Status(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    PLANNED = "planned"
    FAILED = "failed"
    KILLED = "killed"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def clusters(self) -> Path:
        return self.path / "clusters.json"

    @property
    def filters(self) -> Path:
        return self.path / "filters.safetensors"

    @property
    def film(self) -> Path:
        return self.path / "film.safetensors"

    @property
    def outputs(self) -> Path:
        return self.path / "outputs.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def sensitivity(self) -> Path:
        return self.path / "sensitivity.json"

    @property
    def card(self) -> Path:
        return self.path / "pruned.md"

    def between(self, stage: int) -> Path:
        """The folder of the network as it is after a stage (1, 2, …) that is not the last."""
        return self.path / f"pruned_{stage}"

    @property
    def failure(self) -> Path:
        return self.path / "failed.txt"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def trial(self, name: str) -> Path:
        """The folder of a trial, which is a run of its own."""
        return self.path / "trials" / name

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keeps a second process out of the folder; InputError if one is at work in it."""
        lock = FileLock(self._lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(f"the output folder '{self.path}' is in use by a run that is still alive") from None
        try:
            yield
        finally:
            lock.release()

    def is_in_use(self) -> bool:
        """Whether a run holds the lock of the folder."""
        if not self._lock.exists():
            return False
        try:
            with FileLock(self._lock, timeout=0):
                return False
        except Timeout:
            return True

    def clear(self, anew: bool = True) -> None:
        """Removes what says that an older run came to its end; its weights stay until this one's take their place.

        anew  whether no stage has begun, so that what pictures are drawn from is an older run's too, and so are the
              networks between its stages
        """
        pictures = [*self.report.glob("*.png"), *self.report.glob("*.gif")]
        pictures += [self.filters, self.film, self.outputs, self.sensitivity] if anew else []
        networks = [path for path in self.path.glob("pruned_*") if path.name[7:].isdigit()] if anew else []
        kept = [path / name for path in networks for name in (WEIGHTS, DESCRIPTION)]
        for path in (self.summary, self.failure, self.card, self.page, *pictures, *kept):
            if path.is_file():
                path.unlink()
        for path in networks:
            with suppress(OSError):  # of the user's own, with other files in it
                path.rmdir()

    def status(self) -> Status:
        """How far the run in it has come."""
        if self.failure.exists():
            return Status.FAILED
        if self.summary.exists():
            return Status.FINISHED
        if self.is_in_use():
            return Status.RUNNING
        return Status.PLANNED if self.plan.exists() else Status.KILLED

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary.read_text("utf-8"))

"""The journal of a run: checkpoints from which it goes on where it was killed, and the lock of its folder."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from csgd import ranks
from csgd.checkpoint import load_checkpoint, save_checkpoint
from csgd.errors import InputError
from csgd.pipeline.build import code, versions
from csgd.seeds import random_state, set_random_state
from csgd.tracking import Tracker
from csgd.train import Sums

log = logging.getLogger("csgd")

# What may differ between a run and its continuation, since it does not change the result.
FREE = (
    "wandb", "progress", "quiet", "plan_only", "resume", "checkpoint_every", "base.cache", "export",
    "distributed.nproc", "distributed.check_every",
)  # fmt: skip


@contextmanager
def reserved(output_dir: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; InputError if one is at work in it."""
    lock = FileLock(output_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"the output folder '{output_dir}' is in use by a run that is still alive") from None
    try:
        yield
    finally:
        lock.release()


@dataclass
class Journal:
    """Where a run is: `record` holds what is known so far (plain JSON), `saved` the checkpoint to go on from."""

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    saved: dict[str, Any] | None

    @classmethod
    def of(cls, cfg: Any, output_dir: Path) -> "Journal":
        """The journal in `output_dir`, opened at its last checkpoint if cfg.resume is auto and there is one.

        InputError if that is of a run whose result would not be this one's, with the differences, or if checkpoints are
        there and none of them can be read.
        """
        path, config = output_dir / "checkpoints" / "last.pt", _flat(asdict(cfg))
        config |= {"versions.torch": versions()["torch"], "versions.csgd": code()}
        saved = ranks.from_first(load_checkpoint(path) if cfg.resume == "auto" and ranks.is_first() else None)
        if saved is None:
            if cfg.resume == "auto":
                log.info("resume=auto: there is no checkpoint in '%s', the run starts anew", output_dir)
            return cls(path, config, {"seconds": {}}, None)
        _refuse_other("resume=auto", output_dir, saved["config"], config)
        log.info("resumed from %s: %s, step %d", path, saved["phase"], saved["step"])
        return cls(path, config, saved["record"], saved)

    def take(self, *phases: str) -> dict[str, Any] | None:
        """The checkpoint if it is of one of `phases`, once; the random state is then as it was."""
        if self.saved is None or self.saved["phase"] not in phases:
            return None
        saved, self.saved = self.saved, None
        rank, states = ranks.own_share().rank, saved["random_states"]
        if rank < len(states):
            set_random_state(states[rank])
        sums = Sums(**saved["sums"]) if ranks.is_first() else Sums()  # they are of all ranks
        return saved | {"sums": sums}

    def save(self, phase: str, step: int, state: dict[str, Any], sums: Sums, tracker: Tracker, **more: Any) -> None:
        """Writes a checkpoint: the state of the learner, or of the model alone, and everything that fixes the rest.

        phase  base | between (two stages, with all that is known in `record`) | wide | trimmed
        """
        sums.check(step)
        random_states, shared = ranks.gathered(random_state()), sums.shared()
        if not ranks.is_first():
            return
        facts = {
            "phase": phase,
            "step": step,
            "random_states": random_states,
            "sums": {"loss": shared.loss, "hits": shared.hits, "images": shared.images, "steps": shared.steps,
                     "seconds": shared.seconds},
            "rows": tracker.rows,
            "record": self.record,
            "config": self.config,
        }  # fmt: skip
        save_checkpoint(self.path, facts | state | more)


def finished(cfg: Any, output_dir: Path) -> dict[str, Any] | None:
    """The summary of a run that has come to its end in `output_dir`; InputError if it is of another configuration."""
    path = output_dir / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    _refuse_other("hydra.sweep.dir", output_dir, _flat(summary["config"]), _flat(asdict(cfg)))
    return summary


def _refuse_other(key: str, output_dir: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError with the differences between two flat configurations that change the result."""
    differ = [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not name.startswith(FREE)
    ]
    if differ:
        raise InputError(f"{key}: '{output_dir}' holds another configuration or version: {'; '.join(differ)}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {a.b: 1}, lists and other leaves as text."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | None) else str(value)
    return flat

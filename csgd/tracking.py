"""Where numbers go: a line of JSON per epoch, and a W&B run beside it."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csgd.errors import InputError, line_of

log = logging.getLogger(__name__)


class Tracker:
    """Writes metrics.jsonl, and the same rows to W&B.  A W&B that fails is reported once, finished and left alone.

    A context manager: the W&B run is finished when it closes, also by an error, so that the next job of a sweep
    starts its own.
    """

    def __init__(
        self,
        output_dir: Path | None,
        *,
        mode: str,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
        rows: int = 0,
    ):
        """A run that is resumed keeps the first `rows` rows of metrics.jsonl, and W&B gets them again; a new one starts
        an empty file.  Without a folder, as on all ranks but the first, nothing is written.

        InputError, before there is a file, if W&B cannot start for want of a key.
        """
        self._run, self._file, self.rows = None, None, 0
        if output_dir is None:
            return
        if mode != "disabled":
            self._attempt(lambda: self._start(output_dir, mode, config, settings))
        path = output_dir / "metrics.jsonl"
        kept = path.read_text("utf-8").splitlines(keepends=True)[:rows] if path.exists() else []
        scratch = path.with_suffix(".writing")
        scratch.write_text("".join(kept), "utf-8")
        os.replace(scratch, path)
        self.rows = len(kept)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        for line in kept:
            self._log_row(json.loads(line))

    def _start(self, output_dir: Path, mode: str, config, settings) -> None:
        import wandb

        if not (output_dir / "summary.json").exists():
            for stale in (output_dir / "wandb").glob("offline-run-*"):
                shutil.rmtree(stale)  # of a run that was killed or failed here: this one takes its place, rows and all
        try:
            self._run = wandb.init(
                dir=output_dir,
                mode=mode,
                config=dict(config),
                # A run of its own, also beside one that is still open: by default W&B would go on in that.
                settings=wandb.Settings(silent=True, console="off", reinit="create_new"),
                **settings,
            )
        except wandb.errors.UsageError as error:  # no key, a name that is not allowed: better said before training
            raise InputError(f"wandb={mode}: {str(error).rstrip('.')}; wandb=offline needs no account") from None
        # W&B makes a section of each prefix and sorts them by name: base, csgd, forecast, left, report.
        self._run.define_metric("*", step_metric="epoch")
        for counter in ("epoch", "step", "stage"):
            self._run.define_metric(counter, hidden=True)

    def _attempt(self, action) -> None:
        try:
            action()
        except InputError:
            raise
        except Exception as error:  # whatever W&B raises, training goes on
            log.warning("W&B is left alone from here on: %s", line_of(error))
            self._finish(exit_code=1)

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        try:
            if run:
                run.finish(exit_code=exit_code)
        except Exception as error:  # as above
            log.warning("the W&B run could not be finished: %s", line_of(error))

    def log(self, row: Mapping[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(row) + "\n")
        self.rows += 1
        self._log_row(row)

    def _log_row(self, row: Mapping[str, Any]) -> None:
        if self._run:
            self._attempt(lambda: self._run.log(dict(row)))

    def summarise(self, values: Mapping[str, Any]) -> None:
        if self._run:
            self._attempt(lambda: self._run.summary.update(dict(values)))

    def log_image(self, name: str, path: Path) -> None:
        if self._run:
            import wandb

            self._attempt(lambda: self._run.log({name: wandb.Image(str(path))}))

    def log_table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if self._run:
            import wandb

            self._attempt(
                lambda: self._run.log({name: wandb.Table(columns=list(header), data=[list(r) for r in rows])})
            )

    @property
    def offline_dir(self) -> Path | None:
        """The folder of the offline run, for `wandb sync`."""
        return Path(self._run.dir).parent if self._run and self._run.offline else None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._file:
            self._file.close()
        self._finish(exit_code=1 if kind else 0)

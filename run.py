"""python run.py model=vgg16 deps=5_8"""

import logging
import os
import re
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from conf.errors import is_input, one_line
from conf.schema import ConfigError, register
from conf.sweep import launcher_kind

log = logging.getLogger("csgd")

FIRST_RANK = os.environ.get("RANK", "0") == "0"  # of torchrun's processes; the others write nothing
if "RANK" in os.environ:  # DDP warns that it looks for parameters without a gradient
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def quote_fractions(arguments: list[str]) -> list[str]:
    """deps=5_8 → deps='5_8': Hydra's grammar would read the integer 58."""
    bare = re.compile(r"(?<![\w'\"])(\d+_\d+)(?![\w'\"])")
    return [bare.sub(r"'\1'", one) if re.match(r"\+{0,2}deps=", one) else one for one in arguments]


def refuse_numbers(arguments: list[str]) -> None:
    """ConfigError for numbers in the place of the names that `quote_fractions` has quoted."""
    for argument in arguments:
        if re.match(r"\+{0,2}deps=", argument) and re.search(r"[=,(]\s*[\[\d.+-]", argument):
            raise ConfigError(
                f"{argument}: deps must be a name, such as 5_8; a fraction is deps.fraction=0.6, and widths are "
                "deps.widths=[40,40,…]"
            )


def main() -> int:
    """0 if the cut was lossless, 1 if it was not, 2 for input that cannot be used; of a sweep, 2 if a job failed."""
    statuses = []  # of a single run: a sweep is there to show what fails to be lossless, and may run elsewhere

    @hydra.main(config_path="conf", config_name="config", version_base="1.3")
    def job(cfg):
        # Errors are kept from Hydra, which would print a trace, and would stop a sweep after the job's log is lost.
        output_dir = Path(HydraConfig.get().runtime.output_dir)
        found = _begun(output_dir)
        try:
            status, accuracy = _run(OmegaConf.to_object(cfg))
        except KeyboardInterrupt:
            print(f"interrupted: {_way_on(output_dir, typed)}", file=sys.stderr)
            raise
        except Exception as error:
            if wants_trace or (not is_input(error) and HydraConfig.get().mode == RunMode.RUN):
                raise
            _tell_failure(output_dir, found, error)
            status, accuracy = 2, float("nan")
        if HydraConfig.get().mode == RunMode.RUN:
            statuses.append(status)
        return accuracy

    register()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # of a console that lacks some characters
    typed = sys.argv[1:]
    sys.argv[1:] = quote_fractions(sys.argv[1:])
    if not FIRST_RANK:
        sys.argv += [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises faults of the configuration instead of printing them
    try:
        refuse_numbers(sys.argv[1:])
        job()
    except KeyboardInterrupt:
        return 130  # as a shell has it
    except Exception as error:
        if wants_trace or not is_input(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return max(statuses, default=0)


def _run(cfg) -> tuple[int, float]:
    hydra_config = HydraConfig.get()
    output_dir = Path(hydra_config.runtime.output_dir)
    if not cfg.quiet:
        log.info("folder: %s", output_dir)  # at once, as torch takes its time
    from csgd.pipeline import finished, run  # torch is imported once the configuration is known to be good

    if hydra_config.mode == RunMode.MULTIRUN:
        if verdict := finished(cfg, output_dir):
            log.info("finished before: %s", output_dir)
            (output_dir / "failed.txt").unlink(missing_ok=True)
            return _status(cfg, verdict), verdict.accuracy
        cfg.wandb.group = cfg.wandb.group or hydra_config.sweep.dir
        cfg.progress = cfg.progress and launcher_kind(hydra_config.launcher) == "BasicLauncher"
    overrides = [re.sub(r"^(\+{0,2}deps=)'(\d+_\d+)'$", r"\1\2", override) for override in hydra_config.overrides.task]
    logs = OmegaConf.to_container(hydra_config.job_logging, resolve=True)
    verdict = run(cfg, output_dir, shlex.join(["python", "run.py", *overrides]), logs=logs)
    if verdict is None:  # plan_only
        return 0, float("nan")
    return _status(cfg, verdict), verdict.accuracy


def _status(cfg, verdict) -> int:
    """A rival's cut is not meant to be lossless."""
    return 0 if verdict.lossless or cfg.method != "csgd" else 1


def _way_on(output_dir: Path, typed: list[str]) -> str:
    """How a run, or a sweep, that was interrupted goes on."""
    folder = f"hydra.run.dir={output_dir}"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        folder = f"hydra.sweep.dir={HydraConfig.get().sweep.dir}"
    elif not any((output_dir / kept).exists() for kept in ("checkpoints/last.pt", "trials")):
        return "nothing was saved yet; the same command starts anew"
    given = [one for one in typed if not one.startswith(("resume=", "hydra.run.dir=", "hydra.sweep.dir="))]
    return "to go on: " + shlex.join(["python", "run.py", *given, folder, "resume=auto"])


def _begun(output_dir: Path) -> int | None:
    """What tells a run that began in the folder from an earlier one: it puts a new metrics.jsonl in its place."""
    rows = output_dir / "metrics.jsonl"
    return rows.stat().st_ino if rows.exists() else None


def _tell_failure(output_dir: Path, found: int | None, error: Exception) -> None:
    """One line on the console; the trace in the log where it may be a bug."""
    if not is_input(error) or (error.__cause__ and HydraConfig.get().mode == RunMode.MULTIRUN):
        log.error("the job failed", exc_info=error)
    elif error.__cause__ or isinstance(error, OSError):  # it may be a bug all the same
        _keep_trace(error)
    print(f"error: {one_line(error)}", file=sys.stderr)
    if FIRST_RANK:
        _leave_failure(output_dir, found, one_line(error))


def _keep_trace(error: Exception) -> None:
    """Writes the trace of an error to run.log alone."""
    trace = type(error), error, error.__traceback__
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "the job failed", (), trace)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _leave_failure(output_dir: Path, found: int | None, line: str) -> None:
    """Writes failed.txt, unless the folder is another run's: one that is alive, or one beside which none has begun.

    found  what `_begun` said before
    """
    from filelock import FileLock, Timeout  # not for --help

    try:
        with FileLock(output_dir / ".lock", timeout=0):
            if (now := _begun(output_dir)) is None or now != found:
                (output_dir / "failed.txt").write_text(line + "\n", "utf-8")
    except Timeout:
        pass


if __name__ == "__main__":
    sys.exit(main())

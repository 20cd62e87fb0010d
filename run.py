"""python run.py model=vgg16 deps=5_8"""

import logging
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import hydra
from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from conf.schema import ConfigError, register

log = logging.getLogger("csgd")

FIRST_RANK = os.environ.get("RANK", "0") == "0"  # of torchrun's processes; the others write nothing
if "RANK" in os.environ:  # DDP warns that it looks for parameters without a gradient
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def quote_fractions(arguments: list[str]) -> list[str]:
    """deps=5_8 → deps='5_8': Hydra's grammar would read the integer 58."""
    return [
        re.sub(r"\b(\d+_\d+)\b", r"'\1'", argument) if re.match(r"\+{0,2}deps=[\d_,]+$", argument) else argument
        for argument in arguments
    ]


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
        except Exception as error:
            if wants_trace or (not _is_input(error) and HydraConfig.get().mode == RunMode.RUN):
                raise
            if not _is_input(error) or (error.__cause__ and HydraConfig.get().mode == RunMode.MULTIRUN):
                log.exception("the job failed")
            print(f"error: {_one_line(error)}", file=sys.stderr)
            if FIRST_RANK:
                _leave_failure(output_dir, found, _one_line(error))
            status, accuracy = 2, float("nan")
        if HydraConfig.get().mode == RunMode.RUN:
            statuses.append(status)
        return accuracy

    register()
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
        job()
    except Exception as error:
        if wants_trace or not _is_input(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return max(statuses, default=0)


def _run(cfg) -> tuple[int, float]:
    from csgd.pipeline import finished, run  # torch is imported once the configuration is known to be good

    hydra_config = HydraConfig.get()
    output_dir = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        if verdict := finished(cfg, output_dir):
            log.info("finished before: %s", output_dir)
            (output_dir / "failed.txt").unlink(missing_ok=True)
            return 0 if verdict.lossless else 1, verdict.accuracy
        cfg.wandb.group = cfg.wandb.group or hydra_config.sweep.dir
        cfg.progress = cfg.progress and _kind(hydra_config.launcher) == "BasicLauncher"
    overrides = [re.sub(r"^(\+{0,2}deps=)'(\d+_\d+)'$", r"\1\2", override) for override in hydra_config.overrides.task]
    logs = OmegaConf.to_container(hydra_config.job_logging, resolve=True)
    verdict = run(cfg, output_dir, shlex.join(["python", "run.py", *overrides]), logs=logs)
    if verdict is None:  # plan_only
        return 0, float("nan")
    return 0 if verdict.lossless else 1, verdict.accuracy


def _begun(output_dir: Path) -> int | None:
    """What tells a run that began in the folder from an earlier one: it puts a new metrics.jsonl in its place."""
    rows = output_dir / "metrics.jsonl"
    return rows.stat().st_ino if rows.exists() else None


def _leave_failure(output_dir: Path, found: int | None, line: str) -> None:
    """Writes failed.txt, unless the folder is another run's: one that is alive, or one beside which none has begun.

    found  what `_begun` said before
    """
    try:
        with FileLock(output_dir / ".lock", timeout=0):
            if (now := _begun(output_dir)) is None or now != found:
                (output_dir / "failed.txt").write_text(line + "\n")
    except Timeout:
        pass


class Sweep(Callback):
    """Before a sweep: refuses a folder that holds another one, divides the cores.  After it: tables and pictures.

    Leaves by SystemExit, since Hydra does no more than warn of an Exception in a callback.
    """

    def on_multirun_start(self, config, **_):
        try:
            if "RANK" in os.environ:
                raise ConfigError(
                    "torchrun starts the ranks of one run; for those of each job of a sweep there is distributed.nproc"
                )
            jobs = _jobs(config)
            _refuse_other(config, jobs)
            _divide_cores(config.hydra.launcher, len(jobs))
        except Exception as error:
            if not _is_input(error):
                raise
            print(f"error: {_one_line(error)}", file=sys.stderr)
            raise SystemExit(2) from None

    def on_multirun_end(self, config, **_):
        from csgd import sweep

        folder = Path(config.hydra.sweep.dir)
        jobs = sweep.read_jobs(folder)
        print(f"\n{sweep.leave(folder, jobs)}\n\nfiles: {folder}/sweep.csv, sweep.md, *.png")
        if any(folder.glob("*/wandb/offline-run-*")):
            print(f"W&B, offline: upload every run with `wandb sync {folder}/*/wandb/offline-run-*`")
        if any(job.status in ("failed", "running", "killed") for job in jobs):
            print(f"what is missing or failed runs again with the same command and hydra.sweep.dir={folder}")
            raise SystemExit(2)


def _kind(launcher) -> str:
    return launcher._target_.rsplit(".", 1)[-1]


def _jobs(config) -> list[list[str]]:
    """The overrides of each job, as Hydra's own sweeper will number them; none with another sweeper."""
    sweeper = config.hydra.sweeper
    if _kind(sweeper) != "BasicSweeper":
        return []
    given = [*(f"{key}={value}" for key, value in (sweeper.params or {}).items()), *config.hydra.overrides.task]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return BasicSweeper.split_arguments(parser.parse_overrides(given), None)[0]


def _refuse_other(config, jobs: list[list[str]]) -> None:
    """InputError before anything is overwritten, if a job would find the result of another configuration."""
    folder = Path(config.hydra.sweep.dir)
    if not any(folder.glob("*/summary.json")):
        return
    from csgd.pipeline import finished

    for number, overrides in enumerate(jobs):
        cfg = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
        with open_dict(cfg):
            cfg.hydra.job.num = number
            output_dir = folder / cfg.hydra.sweep.subdir
            del cfg["hydra"]
        if (output_dir / "summary.json").exists():
            finished(OmegaConf.to_object(cfg), output_dir)


def _divide_cores(launcher, jobs: int) -> None:
    """Sets OMP_NUM_THREADS, where it is not set, for jobs in processes of their own, and lets them find this file."""
    kind = _kind(launcher)
    if kind == "BasicLauncher":
        return
    from joblib import cpu_count, effective_n_jobs  # comes with scikit-learn

    if kind == "JoblibLauncher":
        at_once = effective_n_jobs(launcher.n_jobs)
        threads = cpu_count() // min(at_once, jobs or at_once)
    elif kind == "LocalLauncher":  # submitit starts all jobs at once
        threads = launcher.cpus_per_task or cpu_count() // (jobs or cpu_count())
    elif kind == "SlurmLauncher":
        if shutil.which("srun") is None:
            raise ConfigError(
                "hydra/launcher=submitit_slurm: there is no srun here; submitit_local and joblib need none"
            )
        threads = launcher.cpus_per_task
    else:
        threads = None
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _is_input(error: Exception) -> bool:
    """Whether the user can mend it; anything else is a bug and keeps its trace."""
    names = {kind.__name__ for kind in type(error).__mro__}  # a faulty configuration must not cost an import of csgd
    known = HydraException | OmegaConfBaseException | ConfigError | OSError
    return isinstance(error, known) or not names.isdisjoint(
        ("InputError", "UncompletedJobError")
    )  # of csgd, of submitit


def _one_line(error: Exception) -> str:
    text = str(error).split("Config search path")[0]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f": {error.__cause__}"
    if "'hydra/launcher/" in text:
        text += "; pip install '.[sweeps]' brings joblib, submitit_local and submitit_slurm"
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())

"""What Hydra calls before a sweep and after it."""

import os
import shutil
import sys
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf, open_dict

from conf.errors import is_input, one_line
from conf.schema import ConfigError


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
            if config.hydra.output_subdir != ".hydra":  # in which the tables of a sweep look for its jobs
                raise ConfigError(f"hydra.output_subdir must be .hydra in a sweep, got {config.hydra.output_subdir!r}")
            jobs = _jobs(config)
            _refuse_other(config, jobs)
            _divide_cores(config.hydra.launcher, len(jobs))
        except Exception as error:
            if not is_input(error):
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise SystemExit(2) from None

    def on_multirun_end(self, config, **_):
        from csgd import sweep

        text, complete = sweep.conclude(Path(config.hydra.sweep.dir))
        print(f"\n{text}")
        if not complete:
            raise SystemExit(2)


def launcher_kind(launcher) -> str:
    """The name of the class of a launcher, or of a sweeper."""
    return launcher._target_.rsplit(".", 1)[-1]


def _jobs(config) -> list[list[str]]:
    """The overrides of each job, as Hydra's own sweeper will number them; none with another sweeper."""
    sweeper = config.hydra.sweeper
    if launcher_kind(sweeper) != "BasicSweeper":
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
    """Sets OMP_NUM_THREADS, where it is not set, for jobs in processes of their own, and lets them find run.py."""
    kind = launcher_kind(launcher)
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
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

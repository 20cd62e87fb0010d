"""python run.py model=vgg16 deps=5_8"""

import logging
import os
import re
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import ConfigError, register

log = logging.getLogger("csgd")


def quote_fractions(arguments: list[str]) -> list[str]:
    """deps=5_8 → deps='5_8': Hydra's grammar would read the integer 58."""
    return [
        re.sub(r"\b(\d+_\d+)\b", r"'\1'", argument) if re.match(r"\+{0,2}deps=[\d_,]+$", argument) else argument
        for argument in arguments
    ]


def main() -> int:
    """0 if the cut was lossless, 1 if it was not, 2 for input that cannot be used; of a sweep, 2 if a job failed."""
    statuses = []

    @hydra.main(config_path="conf", config_name="config", version_base="1.3")
    def job(cfg):
        # Errors are kept from Hydra, which would print a trace, and would stop a sweep after the job's log is lost.
        try:
            status, accuracy = _run(OmegaConf.to_object(cfg))
        except Exception as error:
            if wants_trace or (not _is_input(error) and HydraConfig.get().mode == RunMode.RUN):
                raise
            if not _is_input(error):
                log.exception("the job failed")
            print(f"error: {_one_line(error)}", file=sys.stderr)
            (Path(HydraConfig.get().runtime.output_dir) / "failed.txt").write_text(_one_line(error) + "\n")
            status, accuracy = 2, float("nan")
        statuses.append(status)
        return accuracy

    register()
    sys.argv[1:] = quote_fractions(sys.argv[1:])
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises faults of the configuration instead of printing them
    try:
        job()
    except Exception as error:
        if wants_trace or not _is_input(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    if len(statuses) > 1:  # a sweep is there to show what fails to be lossless
        return 2 if 2 in statuses else 0
    return max(statuses, default=0)


def _run(cfg) -> tuple[int, float]:
    from csgd.pipeline import run  # torch is imported once the configuration is known to be good

    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and cfg.wandb.group is None:
        cfg.wandb.group = hydra_config.sweep.dir
    overrides = [re.sub(r"^(\+{0,2}deps=)'(\d+_\d+)'$", r"\1\2", override) for override in hydra_config.overrides.task]
    verdict = run(cfg, Path(hydra_config.runtime.output_dir), shlex.join(["python", "run.py", *overrides]))
    if verdict is None:  # plan_only
        return 0, float("nan")
    return 0 if verdict.lossless else 1, verdict.accuracy


def _is_input(error: Exception) -> bool:
    """Whether the user can mend it; anything else is a bug and keeps its trace."""
    names = {kind.__name__ for kind in type(error).__mro__}  # a faulty configuration must not cost an import of csgd
    return isinstance(error, HydraException | OmegaConfBaseException | ConfigError | OSError) or "InputError" in names


def _one_line(error: Exception) -> str:
    text = str(error).split("Config search path")[0]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f": {error.__cause__}"
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())

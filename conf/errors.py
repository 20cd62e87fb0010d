"""What of an error a user is told: one line, if the user can mend it."""

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from conf.schema import ConfigError


def is_input(error: Exception) -> bool:
    """Whether the user can mend it; anything else is a bug and keeps its trace."""
    names = {kind.__name__ for kind in type(error).__mro__}  # a faulty configuration must not cost an import of csgd
    known = HydraException | OmegaConfBaseException | ConfigError | OSError
    return isinstance(error, known) or not names.isdisjoint(
        ("InputError", "UncompletedJobError")
    )  # of csgd, of submitit


def one_line(error: Exception) -> str:
    """Its message, with its cause and with what brings a launcher that is missing."""
    text = str(error).split("Config search path")[0]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f": {error.__cause__}"
    if "'hydra/launcher/" in text:
        text += "; pip install '.[sweeps]' brings joblib, submitit_local and submitit_slurm"
    return " ".join(text.split())

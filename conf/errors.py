"""What of an error a user is told: one line, if the user can mend it."""

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from conf.schema import ConfigError


def is_input(error: Exception) -> bool:
    """Whether the user can mend it; anything else is a bug and keeps its trace."""
    names = {kind.__name__ for kind in type(error).__mro__}  # a faulty configuration must not cost an import of csgd
    known = HydraException | OmegaConfBaseException | ConfigError | OSError
    if isinstance(error, known) or not names.isdisjoint(("InputError", "UncompletedJobError")):  # of csgd, of submitit
        return True
    return isinstance(error, ValueError | TypeError) and _raised_in(error).startswith("hydra.")


def _raised_in(error: Exception) -> str:
    """The name of the module that raised an error."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace else ""


def one_line(error: Exception) -> str:
    """Its message, with its cause and with what brings a launcher that is missing."""
    text = str(error).split("Config search path")[0]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += f": {error.__cause__}"
    if text.startswith("Unsupported item value in defaults : int"):
        text += "; a name of digits must be quoted there, as in deps: '5_8'"
    if "'hydra/launcher/" in text:
        text += "; pip install '.[sweeps]' brings joblib, submitit_local and submitit_slurm"
    return " ".join(text.split())

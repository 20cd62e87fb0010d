class InputError(ValueError):
    """Input that cannot be used.  Its message is one line that names what is wrong and what is allowed."""


def line_of(error: Exception) -> str:
    """The first line of an error that does not end a run; of a missing package, what brings it."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return f"{line}; pip install {missing.split('.')[0]}" if missing else line

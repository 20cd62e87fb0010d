class InputError(ValueError):
    """Input that cannot be used.  Its message is one line that names what is wrong and what is allowed."""


class RateError(InputError):
    """A learning rate, or what is bound to it, with which nothing can be trained: of several rates others may do."""


def line_of(error: Exception, own: str = "") -> str:
    """The first line of an error that does not end a run; of a missing package, what brings it.

    own  what does, if it is the user's own
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return f"{line}; pip install {missing.split('.')[0]}{own}" if missing else line

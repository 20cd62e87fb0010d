class InputError(ValueError):
    """Input that cannot be used.  Its message is one line that names what is wrong and what is allowed."""

"""What is said on the terminal, beside its progress bars; run.log holds everything."""

import logging
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm

headline = logging.getLogger("csgd.headline")  # what a run is there to say, also when it is quiet


@contextmanager
def console(quiet: bool, *, verdict: bool = True):
    """Keeps the lines of the log and a progress bar apart; with `quiet` only warnings and the verdict are shown, of a
    trial only warnings."""

    def shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or (verdict and record.name == headline.name)

    root = logging.getLogger()
    handlers = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    if not quiet:
        with logging_redirect_tqdm([root]):
            yield
        return
    for handler in handlers:
        handler.addFilter(shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(shown)

"""One run, from its configuration to its verdict: the only room that knows it."""

from csgd.pipeline.leave import finished
from csgd.pipeline.run import run

__all__ = ["finished", "run"]

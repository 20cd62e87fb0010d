"""One run, from its configuration to its verdict: the only room that reads the configuration."""

from csgd.pipeline.journal import finished
from csgd.pipeline.run import run

__all__ = ["finished", "run"]

"""Which channels of a network move together: labels carried along a real forward pass."""

from csgd.graph.rules import rule
from csgd.graph.spaces import ChannelSpace, Condition, Kind, Ref, describe
from csgd.graph.tracer import trace_spaces
from csgd.graph.twin import Inputs

__all__ = ["ChannelSpace", "Condition", "Inputs", "Kind", "Ref", "describe", "rule", "trace_spaces"]

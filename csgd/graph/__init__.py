"""Which channels of a network move together: labels carried along a real forward pass."""

from csgd.graph.spaces import ChannelSpace, Ref
from csgd.graph.tracer import trace_spaces

__all__ = ["ChannelSpace", "Ref", "trace_spaces"]

"""Centripetal SGD: train the filters of a cluster into one, then cut the duplicates without changing the function."""

from csgd.centripetal import decay_matrix, forecast, merge_matrix
from csgd.clusters import cluster, relative_deviation
from csgd.collapse import Collapse
from csgd.drop import drop, importance, most_important
from csgd.errors import InputError
from csgd.graph import ChannelSpace, Condition, Inputs, Ref, describe
from csgd.optim import CSGD, param_groups
from csgd.proof import Proof, prove
from csgd.pruned import load_pruned, save_pruned
from csgd.reload import load_trimmed
from csgd.trial import find_spaces, pin_failures
from csgd.trim import merge_equal, trim
from csgd.widths import target_widths

__all__ = [
    "CSGD",
    "ChannelSpace",
    "Collapse",
    "Condition",
    "InputError",
    "Inputs",
    "Proof",
    "Ref",
    "cluster",
    "decay_matrix",
    "describe",
    "drop",
    "find_spaces",
    "forecast",
    "importance",
    "load_pruned",
    "load_trimmed",
    "merge_equal",
    "merge_matrix",
    "most_important",
    "param_groups",
    "pin_failures",
    "prove",
    "relative_deviation",
    "save_pruned",
    "target_widths",
    "trim",
]

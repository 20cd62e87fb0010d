"""Centripetal SGD: train the filters of a cluster into one, then cut the duplicates without changing the function.

The way of the data, in the order of the calls:

    spaces = csgd.find_spaces(model, example)  # which channels move together, or why they must stay
    widths = csgd.target_widths(spaces, 5 / 8)  # how many channels each space keeps
    clusters = csgd.cluster(model, spaces, widths)  # which filters become one
    print(csgd.prove(model, spaces, clusters, example))  # exact: before a step is trained
    csgd.Collapse(optimizer, model, spaces, clusters, stop=2000)  # any torch optimizer
    train(model, optimizer)  # your loop stays as it is; members are equal at step 2000
    csgd.trim(model, spaces, clusters, optimizer)  # both go on with the narrow network
    csgd.load_trimmed(Net(), torch.load("pruned.pt"))  # later: a state_dict is its own table of widths

The pull as published is CSGD(param_groups(…), lr) in the place of Collapse.  Facts that docstrings cite (F1 to F14) are
those of docs/method.md, in the repository and in the documentation.
"""

from csgd.budget import Budget, budget_widths
from csgd.centripetal import decay_matrix, forecast, merge_matrix
from csgd.clusters import cluster, relative_deviation
from csgd.collapse import Collapse
from csgd.drop import drop, importance, most_important
from csgd.errors import InputError
from csgd.graph import ChannelSpace, Condition, Inputs, Ref, describe, rule
from csgd.optim import CSGD, param_groups
from csgd.proof import Proof, prove
from csgd.pruned import load_pruned, save_pruned
from csgd.reload import load_trimmed
from csgd.sensitivity import sensitivity
from csgd.trial import find_spaces, pin_failures
from csgd.trim import merge_equal, trim
from csgd.widths import target_widths

__all__ = [
    "CSGD",
    "Budget",
    "ChannelSpace",
    "Collapse",
    "Condition",
    "InputError",
    "Inputs",
    "Proof",
    "Ref",
    "budget_widths",
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
    "rule",
    "save_pruned",
    "sensitivity",
    "target_widths",
    "trim",
]

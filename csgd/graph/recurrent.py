"""Recurrent layers: what is one hidden channel in every gate, and in both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from csgd.graph.labels import along, compact, wide_dims
from csgd.graph.ledger import Ledger
from csgd.graph.rules import Call

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(ledger: Ledger, call: Call) -> str | None:
    """h_t = f(W x_t + U h_{t−1} + b): row k of each gate of W, U and b, and column k of U, are of hidden channel k.

    Torch has one hidden size for all layers and directions of a module, so they are cut alike.  A state that is given
    has these channels too, but for a constant one that has none.
    """
    x, given, weights = call.args[:3]
    biases, layers, both = call.args[3], call.args[4], call.args[7]
    if not isinstance(weights, list | tuple) or len(weights) != layers * (1 + both) * (4 if biases else 2):
        return "no rule for"  # a packed sequence, or projections of the state
    if not all(ledger.owns(weight) for weight in weights):
        return "its weight is not a plain parameter"
    labels = ledger.labels(x)
    if wide_dims(labels) and labels.dim() - 1 not in wide_dims(labels):
        return "runs over the channels"
    many = 4 if biases else 2
    cells = [weights[start : start + many] for start in range(0, len(weights), many)]
    hidden = [_hidden(ledger, cell, GATES[call.name]) for cell in cells]
    for atoms in hidden[1:]:
        ledger.alike(hidden[0], atoms)
    reads = ledger.channels(labels, labels.dim() - 1)
    for layer in range(layers):
        of_layer = slice(layer * (1 + both), (layer + 1) * (1 + both))
        for cell in cells[of_layer]:
            ledger.record(cell[0], 1, reads, "in")
        reads = torch.cat(hidden[of_layer])
    states = torch.stack(hidden).view(len(hidden), *[1] * (call.outputs[1].dim() - 2), -1)
    for state in [given] if isinstance(given, Tensor) else given:
        ledger.learned(of_state := ledger.labels(state), -1, state.size(-1))
        if wide_dims(of_state) or not bool((state == state.reshape(-1)[0]).all()):
            ledger.same_channel(*torch.broadcast_tensors(compact(of_state), states))
    out, *after = call.outputs
    ledger.label(out, along(reads, out.dim() - 1, out.dim()))
    for state in after:
        ledger.label(state, states)
    return None


def _hidden(ledger: Ledger, cell: Sequence[Tensor], gates: int) -> Tensor:
    """The atoms of a cell's hidden channels, the same ones each time it is called."""
    of_input, of_state, *biases = cell
    size = of_state.size(1)
    if (id(of_state), 1) not in ledger.outputs:
        ledger.outputs[id(of_state), 1] = ledger.fresh((1 + gates) * size)
    atoms = ledger.outputs[id(of_state), 1].view(1 + gates, size)
    ledger.clustered_alike(atoms)
    hidden, rows = atoms[0], atoms[1:].reshape(-1)
    for weight in (of_input, of_state):
        ledger.record(weight, 0, rows, "out")
    for bias in biases:
        ledger.record(bias, 0, rows, "follow")
    ledger.record(of_state, 1, hidden, "in")
    return hidden


RECURRENT = dict.fromkeys(GATES, recurrent)

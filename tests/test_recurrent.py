"""Recurrent layers are cut exactly along their hidden channels, and along what they read."""

import copy

import pytest
import torch
from torch import nn

import csgd
from csgd.trial import random_clusters

WORDS = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))


class Reads(nn.Module):
    """Linear → recurrent → what `way` makes of it → linear."""

    def __init__(self, layer: nn.Module, way=lambda net, y: net.layer(y)[0], width: int = 6, **more: nn.Module):
        super().__init__()
        self.embed, self.layer, self.way, self.head = nn.Linear(16, 8), layer, way, nn.Linear(width, 5)
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.head(self.way(self, self.embed(x)))


def last_state(net, y):
    return net.layer(y)[1][0][-1]


def both_states(net, y):
    return torch.cat([*net.layer(y)[1].unbind(0)], -1)


def given_state(net, y):
    """A state that another layer makes, and one of zeros beside it."""
    h = torch.tanh(net.start(y.mean(1)))[None]
    return net.layer(y, (h, torch.zeros_like(h)))[0]


def learned_state(net, y):
    """Parameters that begin at zero."""
    return net.layer(y, net.begin.expand(-1, y.size(1), -1))[0]


def residual(net, y):
    return y + net.layer(y)[0]


def across(net, y):
    return net.layer(y.transpose(1, 2))[0]


def with_begin(layers):
    net = Reads(nn.GRU(8, 6, layers), learned_state)
    net.begin = nn.Parameter(torch.zeros(layers, 1, 6))
    return net


NETS = {  # with the numbers of slots that are free
    "LSTM": (lambda: Reads(nn.LSTM(8, 6, batch_first=True)), 14),
    "GRU": (lambda: Reads(nn.GRU(8, 6, batch_first=True)), 14),
    "tanh": (lambda: Reads(nn.RNN(8, 6, batch_first=True)), 14),
    "relu, time first": (lambda: Reads(nn.RNN(8, 6, nonlinearity="relu")), 14),
    "without biases": (lambda: Reads(nn.LSTM(8, 6, bias=False)), 14),
    "two layers with dropout": (lambda: Reads(nn.LSTM(8, 6, 2, dropout=0.5)), 14),
    "both directions": (lambda: Reads(nn.GRU(8, 6, bidirectional=True), width=12), 14),
    "two layers, both directions": (lambda: Reads(nn.LSTM(8, 6, 2, bidirectional=True), width=12), 14),
    "last state": (lambda: Reads(nn.LSTM(8, 6, batch_first=True), last_state), 14),
    "states of both directions": (lambda: Reads(nn.GRU(8, 6, bidirectional=True), both_states, 12), 14),
    "a state that is given": (
        lambda: Reads(nn.LSTM(8, 6, batch_first=True), given_state, start=nn.Linear(8, 6)),
        14,
    ),
    "a state that is learned": (lambda: with_begin(1), 14),
    "states of two layers that are learned": (lambda: with_begin(2), 14),
    "beside its input": (lambda: Reads(nn.LSTM(8, 8, batch_first=True), residual, 8), 8),
    "one after the other": (
        lambda: Reads(nn.GRU(8, 6), lambda net, y: net.more(net.layer(y)[0])[0], 4, more=nn.LSTM(6, 4)),
        18,
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_hidden_channels_are_cut_exactly(name):
    make, free = NETS[name]
    net = make()
    spaces = csgd.find_spaces(net, WORDS)
    assert sum(space.size for space in spaces if space.trimmable) == free, spaces
    for seed in range(2):
        proof = csgd.prove(net, spaces, random_clusters(spaces, seed), WORDS)
        assert proof.exact, proof
        assert None not in proof.changes.values()
        assert proof.change <= 1e-12
        assert proof.control >= 1e-3
    narrow = copy.deepcopy(net).double().eval()
    clusters = random_clusters(spaces)
    csgd.merge_equal(narrow, spaces, clusters)
    before = narrow(WORDS.double()).detach()
    csgd.trim(narrow, spaces, clusters)
    after = narrow(WORDS.double()).detach()
    assert float((after - before).abs().max()) <= 1e-12
    assert narrow.layer.hidden_size == narrow.layer.weight_hh_l0.size(1) < net.layer.hidden_size
    assert narrow.layer.input_size == 4
    again = csgd.load_trimmed(make().double(), narrow.state_dict(), example=WORDS.double()).eval()
    assert torch.equal(again(WORDS.double()), after)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (lambda: Reads(nn.LSTM(8, 6, proj_size=4), width=4), "no rule for lstm"),
        (lambda: Reads(nn.LSTM(7, 6), across), "lstm: runs over the channels"),
        (
            lambda: Reads(
                nn.GRU(8, 6, batch_first=True),
                lambda net, y: net.layer(nn.utils.rnn.pack_padded_sequence(y, torch.tensor([7, 5, 2]), True))[1][0],
            ),
            "no rule for",
        ),
    ],
    ids=["projections", "time where channels are", "packed"],
)
def test_what_no_rule_foresees_stays(net, reason):
    spaces = csgd.find_spaces(net().double(), WORDS.double())
    assert not any(space.trimmable for space in spaces)
    assert any(reason in why for space in spaces for why in space.pinned), spaces


def test_a_collapse_makes_hidden_channels_equal():
    torch.manual_seed(0)
    net = Reads(nn.LSTM(8, 6, batch_first=True))
    spaces = csgd.find_spaces(net, WORDS)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    csgd.Collapse(optimizer, net, spaces, clusters, stop=20)
    for _ in range(20):
        optimizer.zero_grad()
        net(WORDS).square().mean().backward()
        optimizer.step()
    before = net.eval()(WORDS).detach()
    csgd.trim(net, spaces, clusters, optimizer)
    assert float((net(WORDS).detach() - before).abs().max() / before.std()) <= 5e-6
    net(WORDS).square().mean().backward()
    optimizer.step()

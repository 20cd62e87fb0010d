"""Widths by what each space can spare: measured, kept, and allotted."""

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
from test_budget import NETWORKS
from torch import nn

import csgd
from csgd import InputError
from csgd.budget import steps_by
from tests import nets


def spaces_and(name):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model, example = make(), torch.randn(2, 3, size, size)
    return model, csgd.find_spaces(model, example, trial=False), example


def drawn(spaces, seed=0):
    """What a measurement might look like: changes that rise unevenly, and fall at times."""
    rng = random.Random(seed)
    return {
        space.name: [[space.size * n // 8, rng.lognormvariate(-n, 2)] for n in range(7, 0, -1)]
        for space in spaces
        if space.trimmable
    }


@pytest.mark.parametrize("name", ["VGG-16", "ResNet-56", pytest.param("ConvNeXt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.4}])
def test_a_budget_by_sensitivity_is_met_from_below_within_a_hundredth(name, budget):
    model, spaces, example = spaces_and(name)
    measured = drawn(spaces)
    found = csgd.budget_widths(model, spaces, example, **budget, sensitivity=measured)
    (wish,) = budget.values()
    assert wish - 0.01 <= found.cost <= wish
    widened = 0
    for step in steps_by(measured, spaces, dict.fromkeys(measured, 2), 1):
        above = step.change > found.threshold
        assert not above or all(found.widths[space] > width for space, width in step.widths.items())
        widened += not above and any(found.widths[space] > width for space, width in step.widths.items())
    assert widened < 0.1 * sum(space.size for space in spaces), "what is below the threshold is lost"


class Spare(nn.Module):
    """Three layers of 16 channels: the first has every filter four times, the second is read by weights of nearly 0."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
        with torch.no_grad():
            self.first.weight.copy_(self.first.weight[:4].repeat_interleave(4, 0))
            self.first.bias.copy_(self.first.bias[:4].repeat_interleave(4, 0))
            self.second.weight[8:] = self.second.weight[:8]
            self.second.bias[8:] = self.second.bias[:8]
            self.fc.weight.mul_(20)

    def forward(self, x):
        return self.fc(self.third(self.second(self.first(x).relu()).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def spare():
    """A network, its spaces, a loss that counts its calls, and what was measured with it."""
    torch.manual_seed(0)
    model, images = Spare(), torch.randn(64, 3, 8, 8)
    labels, calls = model(images).argmax(1), []

    def loss_of(network):
        assert not network.training
        assert not torch.is_grad_enabled()
        calls.append(network)
        return F.cross_entropy(network(images), labels)

    spaces, before = csgd.find_spaces(model, images[:2]), copy.deepcopy(model.state_dict())
    measured = csgd.sensitivity(model.train(), spaces, loss_of)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert all(network is not model for network in calls)
    return model, spaces, images[:2], measured, calls


def test_layers_of_equal_filters_cost_nothing_down_to_their_number(spare):
    _, _, _, measured, calls = spare
    assert [width for width, _ in measured["first"]] == [14, 12, 10, 8, 6, 4, 2]
    assert all(abs(change) < 1e-6 for width, change in measured["first"] if width >= 4)
    assert all(abs(change) < 1e-6 for width, change in measured["second"] if width >= 8)
    assert measured["second"][-1][1] > 1e-3
    assert measured["first"][-1][1] > 1e-3
    assert all(change > 1e-6 for _, change in measured["third"])
    assert len(calls) == 1 + 3 * 7, "each space alone, at each width, once"
    assert json.loads(json.dumps(measured)) == measured


def test_what_costs_nothing_is_cut_hardest_and_a_second_budget_measures_nothing(spare):
    model, spaces, example, measured, calls = spare
    before = len(calls)
    for wish in (0.3, 0.25):
        found = csgd.budget_widths(model, spaces, example, params=wish, sensitivity=json.loads(json.dumps(measured)))
        assert wish - 0.01 < found.cost <= wish
        assert found.widths["first"] <= 4
        assert found.widths["second"] <= 8
        assert found.widths["third"] > 8
    assert len(calls) == before
    assert csgd.budget_widths(model, spaces, example, params=0.35, sensitivity=measured).threshold < 1e-6
    halves = {name: rows[:4] for name, rows in measured.items()}  # widths of a half and more
    deep = csgd.budget_widths(model, spaces, example, params=0.1, sensitivity=halves)
    assert deep == csgd.budget_widths(model, spaces, example, params=0.1), "narrower than was measured"


def test_merged_alone_is_what_the_network_says_with_that_space_merged(spare):
    model, spaces, _, _, _ = spare
    images = torch.randn(32, 3, 8, 8)
    labels = torch.zeros(32, dtype=torch.long)

    def loss_of(network):
        return F.cross_entropy(network(images), labels).item()

    found = csgd.sensitivity(model, spaces, loss_of, fractions=[0.125], seed=3)
    model = model.eval()
    for name, ((width, change),) in found.items():
        alone = copy.deepcopy(model)
        csgd.merge_equal(alone, spaces, csgd.cluster(model, spaces, {name: width}, seed=3))
        assert change == pytest.approx(loss_of(alone) - loss_of(model), abs=1e-7)


@pytest.mark.parametrize("make", [nets.Dense, nets.Grouped, nets.ConvNext, nets.Transformer])
def test_all_kinds_of_spaces_have_their_widths(make):
    torch.manual_seed(0)
    model, example = make(), nets.example_of(make)
    spaces = csgd.find_spaces(model, example)
    measured = csgd.sensitivity(model, spaces, lambda network: float(network(example).square().mean()))
    found = csgd.budget_widths(model, spaces, example, macs=0.9, sensitivity=measured, round_to=2)
    csgd.cluster(model, spaces, found.widths)
    assert found.cost <= 0.9


def test_what_cannot_be_measured_or_is_not_known(spare):
    model, spaces, example, _, _ = spare
    with pytest.raises(InputError, match="the loss of the network is nan, so sensitivities cannot be told"):
        csgd.sensitivity(model, spaces, lambda _: float("nan"))
    with pytest.raises(InputError, match="sensitivity: nothing is known of the space 'third'"):
        csgd.budget_widths(model, spaces, example, macs=0.5, sensitivity={"first": [], "second": []})

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import csgd
from csgd import InputError
from csgd.clusters import cluster
from csgd.models import resnet56, vgg16
from csgd.verify import count_params
from tests import nets

NETWORKS = {
    "VGG-16": (lambda: vgg16(num_classes=10, image_size=32), 32),
    "ResNet-56": (lambda: resnet56(num_classes=10), 32),
    "MobileNetV2": (lambda: models.mobilenet_v2(weights=None), 64),
    "DenseNet-121": (lambda: models.densenet121(weights=None), 64),
    "ConvNeXt": (lambda: models.convnext_tiny(weights=None), 64),
}


def macs(model, example):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(example)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if i < 3 else [pytest.mark.slow]) for i, n in enumerate(NETWORKS)]
)
def test_a_budget_is_met_from_below_within_a_hundredth(name):
    make, size = NETWORKS[name]
    model, example = make(), torch.randn(2, 3, size, size)
    spaces = csgd.find_spaces(model, example, trial=False)
    for budget in ({"macs": 0.4}, {"params": 0.4}):
        found = csgd.budget_widths(model, spaces, example, **budget)
        narrow = copy.deepcopy(model)
        csgd.trim(
            narrow, spaces, cluster(model, spaces, found.widths, "even"), tolerance=None
        )  # really cut, and counted
        cost = macs(narrow, example) / macs(model, example)
        if "params" in budget:
            cost = count_params(narrow) / count_params(model)
        assert 0.39 <= cost <= 0.4, budget
        assert found.cost == pytest.approx(cost)
        assert found.least < 0.1


def test_every_space_gets_the_same_fraction_but_for_single_steps():
    model, example = vgg16(num_classes=10, image_size=32), torch.randn(2, 3, 32, 32)
    spaces = csgd.find_spaces(model, example, trial=False)
    widths = csgd.budget_widths(model, spaces, example, macs=0.4).widths
    fractions = [widths[space.name] / space.size for space in spaces if space.trimmable]
    assert max(fractions) - min(fractions) < 2 / 64
    assert 0.6 < min(fractions) < 0.65


def test_what_is_asked_for_is_kept_to():
    model, example = resnet56(num_classes=10), torch.randn(2, 3, 32, 32)
    spaces = csgd.find_spaces(model, example, trial=False)
    found = csgd.budget_widths(model, spaces, example, macs=0.5, round_to=4, keep=["conv1"], min_width=8)
    assert all(width % 4 == 0 and width >= 8 for width in found.widths.values())
    assert found.widths["conv1"] == 16
    assert found.cost <= 0.5
    assert csgd.budget_widths(model, spaces, example, macs=1.0).cost == 1


def test_a_network_of_few_spaces_is_widened_by_more_than_a_step():
    model, example = nets.Plain(), nets.example_of(nets.Plain)
    spaces = csgd.find_spaces(model, example)
    steps = 1 / 8  # what a channel of its only free space is worth, at most
    for wish in (0.35, 0.5, 0.8):
        assert wish - steps < csgd.budget_widths(model, spaces, example, macs=wish).cost <= wish
    two = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, 2))
    two = nn.Sequential(*two, nn.Flatten(), nn.Linear(24 * 9, 10))
    spaces, images = csgd.find_spaces(two, torch.randn(2, 3, 12, 12)), torch.randn(2, 3, 12, 12)
    assert 0.39 <= csgd.budget_widths(two, spaces, images, macs=0.4).cost <= 0.4


class Placed(nn.Module):
    """Makes a constant on the CPU, where the meta device has no arithmetic with it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 16, 3), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.second(self.first(x).relu() * torch.full((), 2.0).item()).mean((2, 3)))


def test_networks_that_do_not_run_on_the_meta_device():
    model, example = Placed(), torch.randn(2, 3, 12, 12)
    spaces = csgd.find_spaces(model, example, trial=False)
    assert 0.45 <= csgd.budget_widths(model, spaces, example, macs=0.5).cost <= 0.5


def test_latency_goes_down():
    model, example = vgg16(num_classes=10, image_size=32), torch.randn(4, 3, 32, 32)
    spaces = csgd.find_spaces(model, example, trial=False)
    found = csgd.budget_widths(model, spaces, example, latency=0.6)
    assert found.widths["features.0"] < 64
    assert found.least < 0.3


def test_a_budget_that_cannot_be_met_or_understood():
    model, example = nets.Plain(), nets.example_of(nets.Plain)
    spaces = csgd.find_spaces(model, example)
    state = copy.deepcopy(model.state_dict())
    for budget, message in (
        ({}, "a budget is one of macs, params and latency, got none"),
        ({"macs": 0.5, "params": 0.5}, "a budget is one of macs, params and latency, got macs, params"),
        ({"macs": 0.01}, r"a budget of 0.01 of the macs cannot be met: the least that can be reached is 0\.\d+"),
        ({"params": 1.5}, "a budget of params must be above 0 and at most 1, got 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            csgd.budget_widths(model, spaces, example, **budget)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))

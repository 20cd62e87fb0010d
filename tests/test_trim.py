import pytest
import torch
from torch import nn

import csgd
from csgd import InputError
from csgd.trial import random_clusters, randomise
from tests import nets


def prepared(net, dtype=torch.float64, equal=True):
    model, example = net().to(dtype), nets.example_of(net, dtype)
    randomise(model)
    spaces = csgd.find_spaces(model, example)
    clusters = random_clusters(spaces)
    if equal:
        csgd.merge_equal(model, spaces, clusters)
    return model.eval(), spaces, clusters, example


@pytest.mark.parametrize("net", nets.EXAMPLES)
def test_a_trimmed_state_dict_is_its_own_table_of_widths(net):
    model, spaces, clusters, example = prepared(net, torch.float32)
    csgd.trim(model, spaces, clusters)
    fresh = csgd.load_trimmed(net(), model.state_dict()).eval()
    assert torch.equal(fresh(example), model(example))
    assert [m.extra_repr() for m in fresh.modules()] == [m.extra_repr() for m in model.modules()]
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in net().parameters())


def test_the_first_slot_is_kept_and_consumers_sum():
    model, spaces, _, _ = prepared(nets.Plain, equal=False)
    conv1, conv2 = model.conv1.weight.clone(), model.conv2.weight.clone()
    csgd.trim(model, spaces, {"conv1": [[3, 0], [5, 1, 2]]})  # slots left out stay alone
    assert torch.equal(model.conv1.weight, conv1[[3, 4, 5, 6, 7]])
    assert torch.equal(model.conv2.weight[:, 0], conv2[:, 3] + conv2[:, 0])
    torch.testing.assert_close(model.conv2.weight[:, 2], conv2[:, [5, 1, 2]].sum(1))
    assert torch.equal(model.conv2.weight[:, 1], conv2[:, 4])
    assert (
        model.conv1.out_channels == model.bn1.num_features == model.act.num_parameters == model.conv2.in_channels == 5
    )


def test_f8_running_statistics_are_averaged_over_the_cluster():
    model, spaces, _, _ = prepared(nets.Plain)
    mean = model.bn1.running_mean.clone()
    csgd.trim(model, spaces, {"conv1": [[0, 1, 4]]})
    assert model.bn1.running_mean[0].item() == pytest.approx(mean[[0, 1, 4]].mean().item())
    assert model.bn1.running_mean.shape == (6,)
    assert model.bn1.num_batches_tracked.dim() == 0


def test_f8_statistics_lag_the_filters():
    """Filters made equal at once: the statistics still differ, and come together as 0.9 per step."""
    model, spaces, clusters, example = prepared(nets.Plain)
    from csgd.verify import statistics_spread

    with torch.no_grad():
        model.bn1.running_mean.uniform_(-1, 1)
    model.train()
    spreads = []
    for _ in range(40):
        spreads.append(statistics_spread(model, spaces, clusters))
        model(example)
    assert spreads[0] > 0.1
    assert spreads[-1] < 0.05 * spreads[0]


def test_trim_refuses_what_has_not_collapsed_when_asked_to():
    model, spaces, clusters, example = prepared(nets.Plain, equal=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match="conv1.weight has not collapsed: relative deviation"):
        csgd.trim(model, spaces, clusters, tolerance=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing was touched"
    csgd.merge_equal(model, spaces, clusters)
    csgd.trim(model, spaces, clusters, tolerance=1e-6)
    model(example)


def test_trimmed_parameters_stay_parameters_and_stay_tied():
    model, spaces, clusters, _ = prepared(nets.Tied)
    model.stem.weight.requires_grad_(False)
    csgd.trim(model, spaces, clusters)
    assert model.left.weight is model.right.weight
    assert isinstance(model.stem.weight, nn.Parameter)
    assert not model.stem.weight.requires_grad
    assert model.fc.weight.requires_grad


@pytest.mark.parametrize(
    "clusters, message",
    [
        ({"nowhere": [[0, 1]]}, "there is no channel space 'nowhere'"),
        ({"conv1": [[0, 1], [1, 2]]}, "clusters.conv1 must name each slot of 0 … 7 at most once"),
        ({"conv1": [[0, 8]]}, "clusters.conv1 must name each slot of 0 … 7 at most once"),
        ({"conv1": [[0, 1], []]}, "clusters.conv1 has an empty cluster"),
        ({"fc2": [[0, 1]]}, "clusters.fc2: the space is pinned .network output."),
    ],
)
def test_bad_clusters_are_refused(clusters, message):
    model, spaces, _, _ = prepared(nets.Plain)
    for act in (csgd.trim, csgd.merge_equal):
        with pytest.raises(InputError, match=message):
            act(model, spaces, clusters)


def test_only_modules_whose_tensors_change_are_touched():
    class Packed(nn.Linear):
        """Its weight is not shaped as its attributes say."""

        def __init__(self):
            super().__init__(6, 6)
            self.weight = nn.Parameter(torch.randn(36, 1))

        def forward(self, x):
            return x @ self.weight.view(self.out_features, self.in_features)

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Softmax(1), Packed())
    spaces = csgd.find_spaces(model, torch.randn(2, 4))
    csgd.trim(model, spaces, {"0": [[0, 1], [2, 3]]})
    assert (model[4].in_features, model[4].out_features) == (6, 6)
    assert model[0].out_features == model[2].in_features == 6
    csgd.load_trimmed(model, model.state_dict())
    assert (model[4].in_features, model[4].out_features) == (6, 6)


def test_load_trimmed_has_the_layout_of_a_cut_in_place():
    wide = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
    narrow = nn.Sequential(nn.Conv2d(8, 5, 3), nn.Conv2d(5, 6, 3)).state_dict()
    csgd.load_trimmed(wide, narrow)
    for layer in wide:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_load_trimmed_refuses_other_networks():
    model, spaces, clusters, _ = prepared(nets.Plain)
    csgd.trim(model, spaces, clusters)
    with pytest.raises(InputError, match="weights of another architecture: missing .*, left over"):
        csgd.load_trimmed(nets.Residual(), model.state_dict())
    wider = {key: torch.zeros([n + 1 for n in value.shape]) for key, value in nets.Plain().state_dict().items()}
    with pytest.raises(InputError, match="conv1.weight is .*, at most .* fit"):
        csgd.load_trimmed(nets.Plain(), wider)

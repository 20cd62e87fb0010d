import copy

import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

import csgd
from csgd import InputError, cluster, find_spaces, target_widths
from csgd.models import resnet20
from tests import nets


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = resnet20(10)
    spaces = find_spaces(model, torch.randn(2, 3, 32, 32), trial=False)
    return model, spaces, target_widths(spaces, 5 / 8)


@pytest.mark.parametrize("method", csgd.clusters.METHODS)
def test_every_method_partitions_every_space_into_its_width(resnet, method):
    model, spaces, widths = resnet
    clusters = cluster(model, spaces, widths, method)
    for space in spaces:
        if space.trimmable:
            parts = clusters[space.name]
            assert len(parts) == widths[space.name]
            assert sorted(slot for part in parts for slot in part) == list(range(space.size))
            assert all(part == sorted(part) for part in parts)


def test_even_and_imbalanced_as_the_paper_defines_them():
    model = nets.Plain()
    spaces = find_spaces(model, nets.example_of(nets.Plain))
    even = cluster(model, spaces, {"conv1": 3}, "even")["conv1"]
    assert even == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert cluster(model, spaces, {"conv1": 3}, "imbalanced")["conv1"] == [[0, 1, 2, 3, 4, 5], [6], [7]]


def test_kmeans_finds_planted_clusters_also_in_a_transposed_conv():
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    spaces = find_spaces(model, torch.randn(nets.IMAGES))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(3, 2, 2, 2)[:, [0, 0, 1, 1, 0, 1]] + 1e-3 * torch.randn(3, 6, 2, 2))
    assert cluster(model, spaces, {"0": 2})["0"] == [[0, 1, 4], [2, 3, 5]]


def test_clustering_of_all_producers_sees_what_the_pacesetter_does_not(resnet):
    model, spaces, _ = resnet
    model = copy.deepcopy(model)
    space = max((s for s in spaces if s.trimmable), key=lambda s: len(s.producers))
    assert len(space.producers) > 1
    with torch.no_grad():
        for ref in space.producers:
            weight = csgd.clusters.tensor_of(model, ref)
            weight.copy_(1e-3 * torch.randn_like(weight))
        weight[::2] += 100.0  # the last producer tells even from odd filters, at whatever scale
    parts = cluster(model, spaces, {space.name: 2}, of="producers")[space.name]
    assert parts == [list(range(0, space.size, 2)), list(range(1, space.size, 2))]
    assert cluster(model, spaces, {space.name: 2}, of="pacesetter")[space.name] != parts
    with pytest.raises(InputError, match=r"clustering\.of must be one of pacesetter, producers"):
        cluster(model, spaces, {space.name: 2}, of="consumers")


def test_kmeans_is_seeded(resnet):
    model, spaces, widths = resnet
    assert cluster(model, spaces, widths, seed=3) == cluster(model, spaces, widths, seed=3)
    assert cluster(model, spaces, widths, seed=3) != cluster(model, spaces, widths, seed=4)


def test_target_width_is_reached_even_among_equal_filters():
    model = nets.Plain()
    spaces = find_spaces(model, nets.example_of(nets.Plain))
    with torch.no_grad():
        model.conv1.weight.zero_()
        model.conv1.weight[7] = 1.0
    clusters = cluster(model, spaces, {"conv1": 5})["conv1"]
    assert len(clusters) == 5
    assert [7] in clusters


def test_width_equal_to_the_size_leaves_singletons(resnet):
    model, spaces, _ = resnet
    assert cluster(model, spaces, {"conv1": 16})["conv1"] == [[slot] for slot in range(16)]


@pytest.mark.parametrize(
    "widths, method, message",
    [
        ({"conv1": 17}, "kmeans", "widths.conv1 must be between 1 and 16, got 17"),
        ({"conv1": 0}, "kmeans", "widths.conv1 must be between 1 and 16, got 0"),
        ({"other": 3}, "kmeans", "there is no channel space 'other'"),
        ({"conv1": 3}, "random", "must be one of kmeans, even, imbalanced, got 'random'"),
    ],
)
def test_bad_input(resnet, widths, method, message):
    with pytest.raises(InputError, match=message):
        cluster(resnet[0], resnet[1], widths, method)


def test_nan_weights_cannot_be_clustered():
    model = nets.Plain()
    spaces = find_spaces(model, nets.example_of(nets.Plain))
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    with pytest.raises(InputError, match="the weights of conv1 hold NaN"):
        cluster(model, spaces, {"conv1": 4})


def test_kmeans_is_the_same_on_any_number_of_threads_and_as_good_as_a_plain_one(resnet):
    model, spaces, widths = resnet
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(cluster(model, spaces, widths, seed=1))
    assert found[0] == found[1]
    for space in spaces:
        if space.trimmable:
            rows = csgd.clusters.filters(model, space).double()
            inertia = sum(float((rows[part] - rows[part].mean(0)).square().sum()) for part in found[0][space.name])
            plain = KMeans(widths[space.name], n_init=1, random_state=1).fit(rows.numpy()).inertia_
            assert inertia <= 1.01 * plain, space.name

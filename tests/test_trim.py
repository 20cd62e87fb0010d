import copy

import numpy as np
import pytest
import torch
from torch import nn

import csgd
from csgd import CSGD, InputError
from csgd.clusters import ClusteredTensor, clustered_tensors
from csgd.proof import randomise
from csgd.trial import random_clusters
from csgd.trim import replace_data
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


def test_the_mean_is_kept_where_the_first_slot_was_and_consumers_sum():
    model, spaces, _, _ = prepared(nets.Plain, equal=False)
    conv1, conv2 = model.conv1.weight.clone(), model.conv2.weight.clone()
    csgd.trim(model, spaces, {"conv1": [[3, 0], [5, 1, 2]]}, tolerance=None)  # slots left out stay alone
    assert torch.equal(model.conv1.weight[[1, 3, 4]], conv1[[4, 6, 7]])
    torch.testing.assert_close(model.conv1.weight[0], conv1[[3, 0]].mean(0))
    torch.testing.assert_close(model.conv1.weight[2], conv1[[5, 1, 2]].mean(0))
    assert torch.equal(model.conv2.weight[:, 0], conv2[:, 3] + conv2[:, 0])
    torch.testing.assert_close(model.conv2.weight[:, 2], conv2[:, [5, 1, 2]].sum(1))
    assert torch.equal(model.conv2.weight[:, 1], conv2[:, 4])
    assert (
        model.conv1.out_channels == model.bn1.num_features == model.act.num_parameters == model.conv2.in_channels == 5
    )


def test_f8_running_statistics_are_averaged_over_the_cluster():
    model, spaces, _, _ = prepared(nets.Plain)
    mean = model.bn1.running_mean.clone()
    csgd.trim(model, spaces, {"conv1": [[0, 1, 4]]}, tolerance=None)
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


def test_trim_refuses_what_has_not_collapsed():
    model, spaces, clusters, example = prepared(nets.Plain, equal=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        InputError, match="has not collapsed: relative deviation .* above the tolerance of 1.0e-03; .*on"
    ):
        csgd.trim(model, spaces, clusters)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing was touched"
    csgd.merge_equal(model, spaces, clusters)
    csgd.trim(model, spaces, clusters, tolerance=1e-12)
    model(example)


def test_trimmed_parameters_stay_parameters_and_stay_tied():
    model, spaces, clusters, _ = prepared(nets.Tied)
    model.stem.weight.requires_grad_(False)
    csgd.trim(model, spaces, clusters)
    assert model.left.weight is model.right.weight
    assert isinstance(model.stem.weight, nn.Parameter)
    assert not model.stem.weight.requires_grad
    assert model.fc.weight.requires_grad


def test_clusters_may_be_arrays():
    model, clusters = nets.Plain(), {"conv1": np.arange(8).reshape(4, 2)}
    spaces = csgd.find_spaces(model, nets.example_of(nets.Plain))
    csgd.merge_equal(model, spaces, clusters)
    csgd.trim(model, spaces, clusters)
    assert len(model.conv1.weight) == 4


def test_a_network_that_is_cut_in_inference_mode_can_be_trained_on():
    model, example = nets.Plain(), nets.example_of(nets.Plain)
    spaces = csgd.find_spaces(model, example)
    clusters = random_clusters(spaces)
    csgd.merge_equal(model, spaces, clusters)
    reloaded = nets.Plain()
    with torch.inference_mode():
        csgd.trim(model, spaces, clusters)
        csgd.load_trimmed(reloaded, model.state_dict())
    for net in (model, reloaded):
        assert len(net.conv1.weight) < 8
        net(example).sum().backward()


@pytest.mark.parametrize(
    "clusters, message",
    [
        ({"nowhere": [[0, 1]]}, "there is no channel space 'nowhere'"),
        ({"conv1": [[0, 1], [1, 2]]}, "clusters.conv1 must name each slot of 0 … 7 at most once"),
        ({"conv1": [[0, 8]]}, "clusters.conv1 must name each slot of 0 … 7 at most once"),
        ({"conv1": [[0, 1], []]}, "clusters.conv1 has an empty cluster"),
        ({"conv1": [0, 1]}, "clusters.conv1 must be a list of lists of slots"),
        ({"conv1": [[0.0, 1.0]]}, "clusters.conv1 must be a list of lists of slots"),
        ({"conv1": [[True, False]]}, "clusters.conv1 must be a list of lists of slots"),
        ({"conv1": None}, "clusters.conv1 must be a list of lists of slots"),
        (None, "clusters must be a mapping"),
        ([[0, 1]], "clusters must be a mapping"),
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
    csgd.trim(model, spaces, {"0": [[0, 1], [2, 3]]}, tolerance=None)
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


def test_a_tensor_that_hides_in_its_group_or_is_not_trained_at_all_is_seen():
    """A17, A16: the deviation is the largest of any tensor: trained, frozen, or statistics."""
    model, spaces, clusters, _ = prepared(nets.Plain)
    assert csgd.relative_deviation(model, spaces, clusters) == 0.0
    optimizer = CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=0.1), 0.1)
    kept = copy.deepcopy(model.state_dict())
    for name, factor in (
        ("conv2.bias", 1e-6),
        ("act.weight", 1.0),
        ("bn1.running_mean", 1.0),
        ("bn1.running_var", 1.0),
    ):
        with torch.no_grad():
            tensor = model.state_dict()[name]
            tensor.copy_(torch.rand_like(tensor) * factor)
        assert csgd.relative_deviation(model, spaces, clusters) > 0.1, name
        if not name.startswith("bn1"):
            assert optimizer.relative_deviation() > 0.1, name
        with pytest.raises(InputError, match=f"^{name} has not collapsed"):
            csgd.trim(model, spaces, clusters)
        model.load_state_dict(kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_never_collapsed(value):
    model, spaces, clusters, _ = prepared(nets.Plain)
    with torch.no_grad():
        model.bn1.bias[:] = value  # also where all are equal
    assert csgd.relative_deviation(model, spaces, clusters) == float("inf")
    with pytest.raises(InputError, match="bn1.bias has not collapsed: relative deviation inf"):
        csgd.trim(model, spaces, clusters)
    with pytest.raises(InputError, match="tolerance must be 0 or more, or None, got nan"):
        csgd.trim(model, spaces, clusters, tolerance=float("nan"))


def test_small_weights_count_as_large_ones_do_and_zeros_are_equal():
    model, spaces, clusters, _ = prepared(nets.Plain, torch.float32, equal=False)
    with torch.no_grad():
        for p in (model.conv1.weight, model.conv1.bias):
            p.mul_(1e-30)
        model.bn1.bias.zero_()
    by_name = {t.name: t.relative_deviation() for t in clustered_tensors(model, spaces, clusters)}
    assert by_name["conv1.weight"] > 0.1
    assert by_name["bn1.bias"] == 0.0


def test_where_nothing_becomes_equal_there_is_no_deviation():
    """A2: "train until it is below 1e-5" must not end at once."""
    model, spaces, _, _ = prepared(nets.Plain)
    singles = {"conv1": [[slot] for slot in range(8)]}
    for clusters in ({}, singles):
        with pytest.raises(InputError, match="no cluster has two members"):
            csgd.relative_deviation(model, spaces, clusters)
        optimizer = CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=0.1), 0.1)
        with pytest.raises(InputError, match="no parameter of this optimizer becomes equal"):
            optimizer.relative_deviation()


def test_frozen_batch_norm_is_noticed_at_the_cut():
    """A16: a layer in eval mode keeps its statistics, whatever its filters do."""
    model, spaces, _, example = prepared(nets.Plain)
    clusters = {"conv1": [[0, 1, 2], [3, 4]]}
    model.train()
    model.bn1.eval()
    optimizer = CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=8.0, vector_ratio=1.0), 0.01)
    for _ in range(150):
        model(example).tanh().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.relative_deviation() < 1e-5
    assert csgd.relative_deviation(model, spaces, clusters) > 0.1
    with pytest.raises(InputError, match="^bn1.running_.* has not collapsed: .* stand still in eval mode"):
        csgd.trim(model, spaces, clusters, optimizer)


def test_trimming_twice_and_other_networks_are_one_line_each():
    model, spaces, clusters, _ = prepared(nets.Plain)
    other = nets.Residual().double()
    csgd.trim(model, spaces, clusters)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    acts = (
        csgd.trim,
        csgd.merge_equal,
        csgd.relative_deviation,
        lambda *given: csgd.param_groups(*given, centri_strength=0.1),
        lambda model, spaces, clusters: csgd.cluster(model, spaces, {name: 2 for name in clusters}),
    )
    for act in acts:
        with pytest.raises(
            InputError, match="conv1.weight has . channels .* found with 8: it has been cut since"
        ) as one:
            act(model, spaces, clusters)
        assert "\n" not in str(one.value)
        with pytest.raises(InputError, match="spaces of another network: this one has no tensor conv1.weight"):
            act(other, spaces, clusters)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_spaces_may_be_cut_one_by_one_where_they_share_no_dim():
    model, spaces, _, example = prepared(nets.Plain, equal=False)
    clusters = {"conv1": [[0, 5], [1, 2, 3]], "conv2": [[0, 1], [4, 5]], "fc1": [[2, 7, 9]]}
    csgd.merge_equal(model, spaces, clusters)
    before = model(example)
    for name in ("conv2", "conv1", "fc1"):
        csgd.trim(model, spaces, {name: clusters[name]})
    assert (before - model(example)).abs().max() < 1e-12
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features) == (5, 4, 8)

    model, spaces, _, _ = prepared(nets.Dense)
    live = [space.name for space in spaces if space.trimmable]
    csgd.trim(model, spaces, {live[0]: [[0, 1]]}, tolerance=None)
    with pytest.raises(InputError, match="it has been cut since"):  # both are read along one dim, of a concat
        csgd.trim(model, spaces, {live[1]: [[0, 1]]}, tolerance=None)


class Row(nn.Parameter):
    pass


def test_what_hangs_on_a_parameter_stays():
    """A23: the parameter stays the same object."""
    model, spaces, clusters, example = prepared(nets.Plain)
    model.conv1.bias = Row(model.conv1.bias.detach().clone())
    model.conv1.weight.no_decay = True
    model.fc1.weight.requires_grad_(False)
    held, calls = [*model.parameters(), *model.buffers()], []
    model.conv1.weight.register_hook(lambda grad: calls.append(("hook", tuple(grad.shape))))
    model.conv1.weight.register_post_accumulate_grad_hook(lambda p: calls.append(("after", tuple(p.grad.shape))))
    other = torch.optim.SGD([model.conv1.weight], 0.1)
    model.train()(example).sum().backward()
    csgd.trim(model, spaces, clusters)
    assert all(a is b for a, b in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    assert model.conv1.weight.no_decay
    assert isinstance(model.conv1.bias, Row)
    assert [p.requires_grad for p in model.fc1.parameters()] == [False, True]
    assert model.conv1.weight.grad is None
    calls.clear()
    model(example).sum().backward()
    width = len(model.conv1.weight)
    assert width < 8
    assert calls == [("hook", (width, 3, 3, 3)), ("after", (width, 3, 3, 3))]
    before = model.conv1.weight.detach().clone()
    other.step()
    assert not torch.equal(before, model.conv1.weight)


def test_training_goes_on_while_the_loss_of_the_wide_network_is_still_held():
    """torch keeps the node that accumulates a gradient for as long as an old graph lives, with the old shape."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        spaces, clusters = csgd.find_spaces(model, torch.randn(2, 4)), {"0": [[0, 1, 2], [3, 4]]}
        model.to(dtype)
        csgd.merge_equal(model, spaces, clusters)
        optimizer = CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=0.1), 0.01)
        losses = []  # all of them are held
        for step in range(4):
            losses.append(model(torch.randn(6, 4, dtype=dtype)).square().mean())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                csgd.trim(model, spaces, clusters, optimizer, tolerance=None)
        assert model[0].weight.shape == (5, 4)


def test_merge_equal_writes_in_place_and_leaves_equal_rows_as_they_are():
    model, spaces, clusters, _ = prepared(nets.Plain, torch.float32)
    model.to(memory_format=torch.channels_last)
    held = [(t, t.clone(), t.data_ptr(), t.stride()) for t in model.state_dict(keep_vars=True).values()]
    csgd.merge_equal(model, spaces, clusters)
    for (tensor, before, place, strides), now in zip(held, model.state_dict(keep_vars=True).values(), strict=True):
        assert tensor is now
        assert (now.data_ptr(), now.stride()) == (place, strides)
        assert torch.equal(now, before)
    csgd.trim(model, spaces, clusters, tolerance=0)
    kept = next(t for t in held if t[0] is model.conv1.weight)[1]
    first = [part[0] for part in sorted(clusters["conv1"], key=lambda part: part[0])]
    assert torch.equal(model.conv1.weight, kept[first]), "bit by bit"


def test_the_layout_of_a_tensor_stays():
    for conv, form in ((nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)):
        for how in (form, torch.contiguous_format):
            model = nn.Sequential(conv(3, 8, 2), nn.ReLU(), conv(8, 4, 2)).to(memory_format=how)
            spaces = csgd.find_spaces(model, torch.randn(2, 3, *[6] * (2 if conv is nn.Conv2d else 3)))
            csgd.trim(model, spaces, {"0": [[0, 1], [2, 3]]}, tolerance=None)
            for layer in (model[0], model[2]):
                assert layer.weight.is_contiguous(memory_format=how)


def test_the_mean_of_a_cluster_changes_the_outputs_less_than_its_first_filter():
    """A26, with 1e-3 of the deviation left."""
    changes = {"mean": [], "first": []}
    for seed in range(30):
        model, spaces, clusters, example = prepared(nets.Plain)
        randomise(model, seed)
        wide = copy.deepcopy(model)
        csgd.merge_equal(model, spaces, clusters)
        with torch.no_grad():
            for p, q in zip(model.state_dict().values(), wide.state_dict().values(), strict=True):
                if p.is_floating_point():
                    p.lerp_(q, 1e-3)
        before = model(example)
        for which, changed in changes.items():
            cut = copy.deepcopy(model)
            if which == "first":
                for t in clustered_tensors(cut, spaces, clusters):
                    if t.merged:
                        t.tensor.data.copy_(t.tensor.index_select(*t.merged))
            csgd.trim(cut, spaces, clusters, tolerance=None)
            changed.append((cut(example) - before).abs().max().item())
    assert 0 < sum(changes["mean"]) < 0.9 * sum(changes["first"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dim, self.deep, self.flag, self.shown = 8, {"sizes": [3, 8], "far": [[[8]]]}, True, "8"
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.classes = 8, 4
        self.block, self.beside = Block(), Block()
        self.act = nn.Softplus(8)

    def forward(self, x):
        return self.block(x)


def test_integers_that_equal_an_old_width_are_told(caplog):
    """A7: torch's own attributes follow, those of the user's modules are listed."""
    model = Whole()
    spaces = csgd.find_spaces(model, torch.randn(2, 3, 4, 4), unused=["beside.*"])
    csgd.merge_equal(model, spaces, {"block.a": [[0, 1, 5]]})
    with caplog.at_level("INFO", "csgd.trim"):
        csgd.trim(model, spaces, {"block.a": [[0, 1, 5]]})
    (record,) = [record for record in caplog.records if record.name == "csgd.trim"]
    told = record.getMessage().split("old width: ")[1].split("; ")
    assert sorted(told) == [
        "block.deep['sizes'][1] = 8 (now 6)",
        "block.dim = 8 (now 6)",
        "width = 8 (now 6)",
    ]


def test_an_optimizer_that_cannot_be_carried_over_is_refused_before_anything_changes():
    model, spaces, clusters, _ = prepared(nets.Plain)
    twin = copy.deepcopy(model)
    strange = CSGD(csgd.param_groups(twin, spaces, clusters, centri_strength=0.1), 0.1)
    for optimizer, message in (
        ("adam", "a str is no torch optimizer that calls hooks"),
        (torch.optim.SGD(twin.parameters(), 0.1), "trains none of the parameters that are cut"),
        (strange, "trains none of the parameters that are cut"),
    ):
        with pytest.raises(InputError, match=message):
            csgd.trim(model, spaces, clusters, optimizer)
    assert model.conv1.weight.shape == twin.conv1.weight.shape


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_csgd_that_was_not_taken_along_says_so(momentum):
    model, spaces, clusters, example = prepared(nets.Plain)
    optimizer = CSGD(csgd.param_groups(model, spaces, clusters, centri_strength=0.1), 0.01, momentum, momentum > 0)
    for step in range(2):
        model(example).square().mean().backward()
        if step:
            with pytest.raises(InputError, match="was cut without it"):
                optimizer.step()
            with pytest.raises(InputError, match="was cut without it"):
                optimizer.relative_deviation()
        else:
            optimizer.step()
            csgd.trim(model, spaces, clusters, tolerance=None)


def test_constants_that_are_expanded_complex_or_whole_numbers_are_followers_too():
    segments = torch.tensor([0, 0, 2, 2])
    for tensor, mean, equal in (
        (torch.tensor([1 + 2j, 3 + 4j, 5j, 5j]), [2 + 3j, 5j], False),
        (torch.tensor([3, 3, 7, 7]), [3, 7], True),
        (torch.tensor([True, False, False, False]), [True, False], False),
        (torch.tensor(2.0).expand(4), [2.0, 2.0], True),
    ):
        t, dtype = ClusteredTensor([("", "x")], tensor, (0, segments), None), tensor.dtype
        assert (t.relative_deviation() == 0) is equal
        replace_data(tensor, t.narrowed(tensor))
        assert tensor.tolist() == mean
        assert tensor.dtype == dtype

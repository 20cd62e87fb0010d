"""A layer with weight norm, w = g · v / ‖v‖, is cut like a plain one: what counts is w, whatever ‖v‖ runs over."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import csgd
from csgd.pipeline.by_layer import latencies, of_modules
from csgd.proof import randomise
from csgd.trial import random_clusters
from csgd.verify import count_macs
from tests.test_picks import Net, check_exact, conv, head

IMAGES, ROWS, SOUND = torch.randn(2, 3, 8, 8), torch.randn(4, 6), torch.randn(2, 3, 24)


def older(layer, dim=0):
    """The hook that torch had before its parametrizations; a weight with a gradient could not be copied."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def mlp(normed=weight_norm):
    layers = [normed(nn.Linear(a, b)) for a, b in ((6, 16), (16, 12), (12, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), layers[2])


def convs(normed=weight_norm):
    def way(net, x):
        return net.h(F.max_pool2d(net.b(net.n(net.a(x)).relu()).relu(), 2).flatten(1))

    fc = normed(nn.Linear(6 * 16, 5))
    return Net(way, a=normed(conv(3, 8)), n=nn.BatchNorm2d(8), b=normed(conv(8, 6, bias=False)), h=fc)


def mixed():
    """Plain and normed layers of one residual stream, a depthwise and a grouped kernel, of two channels a slot."""

    def way(net, x):
        x = net.a(x).relu()
        x = x + net.c(net.d(net.b(x)).relu())
        return net.h(net.g(x).relu())

    parts = dict(a=conv(3, 8), b=weight_norm(conv(8, 12)), d=weight_norm(conv(12, 12, groups=12)), c=conv(12, 8))
    return Net(way, **parts, g=weight_norm(conv(8, 8, groups=2)), h=head(8))


def dilated(normed=weight_norm):
    """WaveNet: gated, dilated, with a residual and a skip."""

    def way(net, x):
        x, skips = net.enter(x), 0
        for one, two in zip(net.dilated, net.mix, strict=True):
            filtered, gate = one(x).chunk(2, 1)
            residual, skip = two(filtered.tanh() * gate.sigmoid()).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return net.leave(skips.relu())

    return Net(
        way,
        enter=normed(nn.Conv1d(3, 8, 1)),
        dilated=nn.ModuleList(normed(nn.Conv1d(8, 16, 3, padding=2**i, dilation=2**i)) for i in range(3)),
        mix=nn.ModuleList(normed(nn.Conv1d(8, 16, 1)) for _ in range(3)),
        leave=normed(nn.Conv1d(8, 2, 1)),
    )


def vocoder(normed=weight_norm):
    """Transposed convs, whose lengths are those of what they read."""

    def way(net, x):
        x = net.up(net.enter(x).relu())
        return net.leave(net.up2(x + net.block(x.relu())).relu())

    return Net(
        way,
        enter=normed(nn.Conv1d(3, 8, 3, padding=1)),
        up=normed(nn.ConvTranspose1d(8, 12, 4, 2, 1)),
        block=normed(nn.Conv1d(12, 12, 3, padding=1)),
        up2=normed(nn.ConvTranspose1d(12, 6, 4, 2, 1)),
        leave=normed(nn.Conv1d(6, 2, 1)),
    )


def of_inputs(layer):
    return weight_norm(layer, dim=1)


NETS = {  # how it is made, what it takes, how many slots are free
    "mlp": (mlp, ROWS, 28),
    "mlp, hook": (lambda: mlp(older), ROWS, 28),
    "mlp, lengths of inputs": (lambda: mlp(of_inputs), ROWS, 28),
    "convs": (convs, IMAGES, 14),
    "convs, hook": (lambda: convs(older), IMAGES, 14),
    "convs, lengths of inputs": (lambda: convs(of_inputs), IMAGES, 14),
    "mixed": (mixed, IMAGES, 4 + 12 + 4),
    "dilated": (dilated, SOUND, 8 + 3 * 8),
    "vocoder": (vocoder, SOUND, 26),
    "vocoder, hook": (lambda: vocoder(older), SOUND, 26),
}


@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_cut_exactly(name):
    make, x, free = NETS[name]
    _, _, narrow = check_exact(make(), x, free=free)
    again = csgd.load_trimmed(make().double(), narrow.state_dict(), example=x.double()).eval()
    assert torch.equal(again(x.double()), narrow(x.double()))
    for one, other in zip(narrow.modules(), again.modules(), strict=True):
        said = [{key: value for key, value in vars(m).items() if type(value) is int} for m in (one, other)]
        assert said[0] == said[1]
    if "hook" not in name:  # it keeps a reader from trying shapes alone
        csgd.load_trimmed(make().double(), narrow.state_dict())


def random_net(make, x):
    """A network in float64 with random weights, its spaces, clusters of half of each."""
    net = make().double()
    randomise(net)
    spaces = csgd.find_spaces(net, x.double())
    return net, spaces, random_clusters(spaces)


def weights_of(net):
    return [m.weight.detach().clone() for m in net.modules() if isinstance(m, nn.Linear | nn.Conv1d)]


def test_the_cut_of_a_weight_is_that_of_g_v_over_the_norm_of_v():
    net, spaces, _ = random_net(mlp, ROWS)
    csgd.merge_equal(net, spaces, clusters := {"0": [[0, 3], [1, 2, 5]], "2": [[4, 7]]})
    first, second, _ = weights_of(net)
    csgd.trim(net, spaces, clusters)
    left = [i for i in range(16) if i not in (2, 3, 5)]
    summed = second.index_add(1, torch.tensor([0, 1, 1]), second[:, [3, 2, 5]])
    for layer, weight in ((net[0], first[left]), (net[2], summed[[i for i in range(12) if i != 7]][:, left])):
        torch.testing.assert_close(layer.weight, weight, rtol=1e-13, atol=1e-13)
    assert (net[0].out_features, net[2].in_features, net[2].out_features, net[4].in_features) == (13, 13, 11, 11)


@pytest.mark.parametrize("make, x", [(mlp, ROWS), (vocoder, SOUND)])
def test_inputs_whose_sum_is_zero_leave_a_length_of_zero(make, x):
    net, spaces, _ = random_net(make, x)
    reader, name = (net[2], "0") if make is mlp else (net.up, "enter")
    with torch.no_grad():
        v, dim = reader.parametrizations.weight.original1, 1 if make is mlp else 0
        v.transpose(0, dim)[2:] = 0 if dim else 1  # of the inputs that are read two are left, each the other's opposite
        v.transpose(0, dim)[1] = -v.transpose(0, dim)[0]
        reader.parametrizations.weight.original0.fill_(1.5)
    csgd.merge_equal(net, spaces, clusters := {name: [[0, 1]]})
    before = net(x.double())
    csgd.trim(net, spaces, clusters)
    assert net(x.double()).isfinite().all()
    torch.testing.assert_close(net(x.double()), before, rtol=1e-12, atol=1e-12)


def test_a_pull_collapses_kernels_and_lengths_and_the_cut_is_lossless():
    for make, x in ((dilated, SOUND), (vocoder, SOUND)):
        net, spaces, clusters = random_net(make, x)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        csgd.Collapse(optimizer, net, spaces, clusters, stop=6)
        for _ in range(8):
            optimizer.zero_grad()
            (net(x.double()) - 1).square().mean().backward()
            optimizer.step()
        assert csgd.relative_deviation(net, spaces, clusters) < 1e-14
        before = net(x.double())
        csgd.trim(net, spaces, clusters, optimizer)
        torch.testing.assert_close(net(x.double()), before, rtol=1e-12, atol=1e-12)
        for _ in range(3):  # the state has the shapes of what is left
            optimizer.zero_grad()
            (net(x.double()) - 1).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize("kind", ["CSGD", "SGD"])
def test_f7_steps_go_on_where_only_filters_are_cut(kind):
    """Of a layer whose inputs are cut too ‖v‖ becomes another, and with it the direction that a step leaves out."""

    def way(net, x):
        return net.h(net.a(x).relu())

    ends, of_all = [], dict(lr=0.02, momentum=0.9)
    wide, spaces, clusters = random_net(lambda: Net(way, a=weight_norm(nn.Linear(6, 16)), h=nn.Linear(16, 3)), ROWS)
    csgd.merge_equal(wide, spaces, clusters)
    for narrow in (False, True):
        net = copy.deepcopy(wide)
        if kind == "CSGD":
            groups = csgd.param_groups(net, spaces, clusters, centri_strength=0.1, weight_decay=1e-3)
            optimizer = csgd.CSGD(groups, **of_all)
        else:
            optimizer = torch.optim.SGD(net.parameters(), **of_all)
            csgd.Collapse(optimizer, net, spaces, clusters, stop=1)
        for step in range(6):
            if step == 2 and narrow:
                csgd.trim(net, spaces, clusters, optimizer, tolerance=1e-9)
            optimizer.zero_grad()
            (net(ROWS.double()) - 1).square().mean().backward()
            optimizer.step()
        ends.append(net(ROWS.double()))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_what_is_dropped_takes_its_part_of_each_weight():
    net, spaces, _ = random_net(mlp, ROWS)
    scores = csgd.importance(net, spaces, "l1")
    first, second, third = weights_of(net)
    torch.testing.assert_close(scores["0"], first.abs().sum(1))
    csgd.drop(net, spaces, {"0": [1, 4, 6], "2": [0, 2]})
    left = first[[1, 4, 6]], second[[0, 2]][:, [1, 4, 6]], third[:, [0, 2]]
    for one, other in zip(weights_of(net), left, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_clusters_are_of_weights_and_of_outputs():
    net, spaces, _ = random_net(mlp, ROWS)
    with torch.no_grad():  # alike as weights, not as kernels
        kernel = net[0].parametrizations.weight
        kernel.original1[8:] = 3 * kernel.original1[:8]
        kernel.original0[8:] = kernel.original0[:8]
        net[0].bias[8:] = net[0].bias[:8]
    pairs = [[i, i + 8] for i in range(8)]
    assert csgd.cluster(net, spaces, {"0": 8})["0"] == pairs
    assert csgd.cluster(net, spaces, {"0": 8}, of="outputs", data=[ROWS.double()])["0"] == pairs


class Scaled(nn.Module):
    """A parametrization of one's own on top of weight norm."""

    def forward(self, weight):
        return 2 * weight


def scaled(layer):
    parametrize.register_parametrization(weight_norm(layer), "weight", Scaled())
    return layer


@pytest.mark.parametrize(
    "normed, reason",
    [
        (spectral_norm, "its weight is computed, not a plain parameter"),
        (orthogonal, "its weight is computed, not a plain parameter"),
        (lambda layer: weight_norm(layer, dim=None), "weight_norm: one length for the whole kernel (dim=None)"),
        (scaled, "a weight with weight norm is used outside conv and linear layers"),
    ],
)
def test_other_weights_that_are_computed_stay_and_say_why(normed, reason):
    net = Net(lambda net, x: net.h(net.b(net.a(x).relu())), a=normed(conv(3, 8)), b=normed(conv(8, 8)), h=head(8))
    spaces = csgd.find_spaces(net, IMAGES)
    assert not any(space.trimmable for space in spaces)
    assert {space.name for space in spaces} >= {"a", "b"}
    assert all(any(reason in one for one in space.pinned) for space in spaces if space.name in ("a", "b")), spaces


def test_lengths_of_two_kernels_stay():
    a, b = weight_norm(conv(3, 8)), weight_norm(conv(8, 8))
    b.parametrizations.weight.original0 = a.parametrizations.weight.original0
    net = Net(lambda net, x: net.h(net.b(net.a(x).relu()).relu()), a=a, b=b, h=head(8))
    assert not any(space.trimmable for space in csgd.find_spaces(net, IMAGES))


def test_a_layer_that_is_called_twice_is_cut_once():
    def way(net, x):
        y = net.a(x)
        return net.h(y + net.b(net.b(y).relu()))

    check_exact(Net(way, a=weight_norm(conv(3, 8)), b=weight_norm(conv(8, 8)), h=head(8)), IMAGES, free=8)


@pytest.mark.parametrize("make, x", [(convs, IMAGES), (vocoder, SOUND)])
def test_a_budget_prices_what_a_cut_leaves(make, x):
    net, spaces, _ = random_net(make, x)
    budget = csgd.budget_widths(net, spaces, x.double(), macs=0.5)
    csgd.trim(net, spaces, csgd.cluster(net, spaces, budget.widths, "even"), tolerance=None)
    assert (
        count_macs(net, x.double()) / count_macs(make(), x) == pytest.approx(budget.cost) == pytest.approx(0.5, abs=0.1)
    )


def test_costs_are_those_of_layers():
    net, spaces, _ = random_net(convs, IMAGES)
    times = latencies({"wide": net}, IMAGES.double())["wide"]
    assert times.keys() == {"", "a", "n", "b", "h"}
    assert of_modules(net, spaces, {}, {"a": 3.0, "b": 2.0, "h": 1.0}) == {"a": 3.0, "b": 2.0, "h": 1.0}


def test_lengths_that_do_not_fit_their_kernel_are_refused():
    net, spaces, clusters = random_net(convs, IMAGES)
    csgd.trim(net, spaces, clusters, tolerance=None)
    weights = net.state_dict()
    weights["b.parametrizations.weight.original0"] = weights["b.parametrizations.weight.original0"][:1]
    for how in ({}, {"example": IMAGES.double()}):
        with pytest.raises(csgd.InputError, match="do not fit"):
            csgd.load_trimmed(convs().double(), weights, **how)


def test_a_layer_that_the_example_does_not_reach_pins_what_it_may_read():
    net = Net(lambda net, x: net.h(net.a(x).relu()), a=weight_norm(conv(3, 8)), h=head(8), aux=weight_norm(conv(8, 4)))
    (a,) = [space for space in csgd.find_spaces(net, IMAGES) if space.name == "a"]
    assert a.pinned == ["aux, which the example does not reach, may read it: examples=[…] or unused=['aux'] free it"]
    assert any(space.trimmable for space in csgd.find_spaces(net, IMAGES, unused=["aux"]))

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import csgd
from csgd import InputError
from csgd.graph import Kind, conditions
from csgd.trial import random_clusters
from tests import nets
from tests.test_graph import Apply, Net


def found(net, example=None):
    example = torch.randn(nets.IMAGES) if example is None else example
    return csgd.find_spaces(net, example), example


def by_name(spaces):
    return {space.name: space for space in spaces}


def last(function):
    """A function of channels last, for channels first."""
    return lambda x, m: function(x.movedim(1, -1), m).movedim(-1, 1)


def by_hand(x, _):
    mean = x.mean(1, keepdim=True)
    return (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


def by_variance(x, _):
    var, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
    return (x - mean) * (var + 1e-6).rsqrt()


def response(x, _):
    size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return x * (size / (size.mean(1, keepdim=True) + 1e-6)) + x


NORMS = {
    "layer norm": last(lambda x, m: F.layer_norm(x, x.shape[-1:])),
    "layer norm of all but the batch": lambda x, m: F.layer_norm(x, x.shape[1:]),
    "RMS norm": last(lambda x, m: F.rms_norm(x, x.shape[-1:])),
    "group norm": lambda x, m: F.group_norm(x, 2),
    "group norm of one group": lambda x, m: F.group_norm(x, 1),
    "mean and variance by hand": by_hand,
    "mean and variance at once": by_variance,
    "standard deviation": lambda x, m: x / (x.std(1, False).unsqueeze(1) + 1e-3),
    "root of the mean square": last(lambda x, m: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "global response": response,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_over_channels_is_cut_exactly_with_clusters_of_one_size_and_with_no_others(name):
    net = Net(Apply(NORMS[name]))
    spaces, example = found(net)
    space = by_name(spaces)["conv"]
    assert space.trimmable, space.pinned
    (condition,) = space.conditions
    assert condition.kind is Kind.ONE_SIZE
    assert condition.sizes == (2, 4)
    assert len(condition.parts) == (2 if name == "group norm" else 1)
    for seed in range(3):
        proof = csgd.prove(net, spaces, random_clusters(spaces, seed, ratio=None), example)
        assert proof.exact
        assert proof.change <= 1e-12
        assert proof.control >= 1e-3
    unequal = {"conv": [[0, 1, 2], [3], [4, 5], [6, 7]]}
    with pytest.raises(InputError, match="clusters.conv: clusters of one size"):
        csgd.prove(net, spaces, unequal, example)
    space.conditions.clear()
    assert not csgd.prove(net, spaces, unequal, example).exact


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x, m: x / x.var(1, keepdim=True), "var: runs over the channels"),  # divides by n - 1
        (lambda x, m: x / torch.std(x, 1, True, keepdim=True), "std: runs over the channels"),
        (lambda x, m: x / x.square().sum(1, keepdim=True), "sum: runs over the channels"),
        (lambda x, m: x / x.norm(dim=1, keepdim=True), "norm: runs over the channels"),
        (lambda x, m: F.layer_norm(x.view(2, 2, 4, 64), (4, 64)).view_as(x), "splits the channel axis"),
    ],
)
def test_what_weighs_copies_otherwise_is_pinned(function, reason):
    spaces, _ = found(Net(Apply(function)))
    assert reason in "; ".join(by_name(spaces)["conv"].pinned)


def test_a_norm_over_channels_of_which_some_must_stay_pins_the_others():
    net = Net(
        Apply(lambda x, m: F.group_norm(torch.cat([x, m.image(x)[:, :3].sigmoid()], 1), 1), image=nn.Conv2d(8, 8, 1)),
        out=11,
    )
    spaces, _ = found(net)
    assert by_name(spaces)["conv"].pinned == ["group_norm in body: runs over channels of which some must stay"]
    with_mean = Net(Apply(lambda x, m: F.group_norm(torch.cat([x, x.mean(1, keepdim=True)], 1), 1)), out=9)
    assert by_name(found(with_mean)[0])["conv"].pinned == ["mean in body: runs over channels of which some must stay"]


def test_a_prime_number_of_channels_makes_no_clusters_of_one_size():
    spaces, _ = found(Net(Apply(lambda x, m: F.group_norm(x, 1)), channels=7, out=7))
    assert by_name(spaces)["conv"].pinned == [
        "group_norm in body: runs over channels that make no clusters of one size"
    ]


def test_spaces_under_one_norm_are_tied_and_groups_are_parts():
    spaces, example = found(nets.UNet())
    enter, down, merge = (by_name(spaces)[name] for name in ("enter", "down", "merge"))
    assert not merge.conditions
    (one,), (other,) = enter.conditions, down.conditions
    assert one.tied == other.tied == ("enter", "down")
    # groups of 4 channels of norm1; groups of 4 of norm2, the first of which share a group of norm3 with those of enter
    assert one.parts == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert other.parts == tuple(tuple(range(start, start + 4)) for start in (0, 4, 8, 12))
    assert one.sizes == other.sizes == (2, 4)
    assert [[space.name for space in group] for group in conditions.tied(spaces)] == [["enter", "down"], ["merge"]]
    assert "clusters of one size within each of 4 groups, 2 or 4, the same in 2 spaces" in csgd.describe(spaces)
    halves = {"enter": [[0, 1], [2, 3], [4, 5], [6, 7]], "down": [[n, n + 1] for n in range(0, 16, 2)]}
    assert csgd.prove(nets.UNet(), spaces, halves, example).exact
    across = halves | {"enter": [[0, 4], [1, 5], [2, 6], [3, 7]]}
    thirds = halves | {"down": [list(range(n, n + 4)) for n in range(0, 16, 4)]}
    for wrong in (across, thirds, {"enter": halves["enter"]}, {"enter": halves["enter"], "down": halves["down"][:-1]}):
        for use in (
            lambda model, wrong=wrong: csgd.prove(model, spaces, wrong, example),
            lambda model, wrong=wrong: csgd.trim(model, spaces, wrong, tolerance=None),
            lambda model, wrong=wrong: csgd.param_groups(model, spaces, wrong, centri_strength=0.1),
        ):
            with pytest.raises(
                InputError, match=r"clusters.(enter|down): clusters of one size within each of . groups"
            ):
                use(nets.UNet())


def test_a_space_that_fails_its_trial_takes_along_those_that_are_tied_to_it():
    def body(x, m):
        return F.group_norm(torch.cat([x, m.other(x) / x.shape[1]], 1), 1) + m.free(torch.tanh(x))

    net = Net(Apply(body, other=nn.Conv2d(8, 8, 1), free=nn.Conv2d(8, 16, 1)), out=16)
    spaces = by_name(found(net)[0])
    assert all("its trial trim changes the output" in spaces[name].pinned for name in ("conv", "body.other"))


def test_lengths_in_the_attributes_of_norms_follow_the_cut():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.normalized_shape = nn.Parameter(torch.ones(8)), (8,)
            self.plain, self.bare, self.rms = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8)
            self.groups = nn.GroupNorm(2, 8, affine=False)

        def forward(self, x):
            y = self.groups(x).movedim(1, -1)
            y = F.layer_norm(
                self.rms(self.bare(self.plain(y).tanh()).tanh()).tanh(), self.normalized_shape, self.weight
            )
            return y.movedim(-1, 1)

    net = Net(Own())
    spaces, _ = found(net)
    csgd.trim(net, spaces, {"conv": [[0, 3], [1, 2], [4, 5], [6, 7]]}, tolerance=None)
    body = net.body
    assert body.normalized_shape == body.plain.normalized_shape == body.bare.normalized_shape == (4,)
    assert body.rms.normalized_shape == (4,)
    assert (body.groups.num_groups, body.groups.num_channels) == (2, 4)
    spaces, example = found(net)
    assert by_name(spaces)["conv"].conditions[0].sizes == (2,)
    assert csgd.prove(net, spaces, random_clusters(spaces), example).exact


class Sized(nn.Module):
    """A block that says its widths in integers of its own, as those of diffusion models do."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.channels, self.shape, self.kernel = channels, (out, 1, 1), 3
        self.conv, self.scale = nn.Conv2d(channels, out, 3, padding=1), nn.Parameter(torch.ones(out))

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x) * self.scale.view(self.shape)


def test_integers_that_say_a_width_follow_the_cut_where_it_would_raise_otherwise():
    net = Net(nn.Sequential(Sized(8, 12), nn.Tanh(), Sized(12, 8)))
    spaces, example = found(net)
    assert [space.name for space in spaces if space.trimmable] == ["conv", "body.0.conv", "body.2.conv"]
    clusters = random_clusters(spaces, ratio=None)
    widths = [len(clusters[name]) for name in ("conv", "body.0.conv", "body.2.conv")]
    assert csgd.prove(net, spaces, clusters, example).exact
    csgd.trim(net, spaces, clusters, tolerance=None)
    first, second = net.body[0], net.body[2]
    assert (first.channels, first.shape, first.kernel) == (widths[0], (widths[1], 1, 1), 3)
    assert (second.channels, second.shape) == (widths[1], (widths[2], 1, 1))
    for given in ({}, {"example": example}):
        again = csgd.load_trimmed(Net(nn.Sequential(Sized(8, 12), nn.Tanh(), Sized(12, 8))), net.state_dict(), **given)
        assert torch.equal(again(example), net(example))
        assert (again.body[0].channels, again.body[2].shape) == (first.channels, second.shape)

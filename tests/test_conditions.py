import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import csgd
from csgd import InputError
from csgd.graph import Kind, conditions
from csgd.pipeline.setup import spaces_of
from csgd.proof import Trial
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


def in_groups(shape):
    """A group norm by hand, of two groups of channels."""

    def norm(x, _):
        groups, dims = x.reshape(shape(x)), tuple(range(-len(shape(x)) + 2, 0)) if len(shape(x)) > 2 else (-1,)
        mean, var = groups.mean(dims, keepdim=True), groups.var(dims, unbiased=False, keepdim=True)
        return ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)

    return norm


BY_HAND = {
    "a dim of groups": in_groups(lambda x: (x.size(0), 2, x.size(1) // 2, *x.shape[2:])),
    "a row for each group": in_groups(lambda x: (x.size(0), 2, -1)),
    "groups beside images": in_groups(lambda x: (2 * x.size(0), -1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_group_norm_by_hand_is_cut_alike_in_each_group(name):
    net = Net(Apply(BY_HAND[name]))
    spaces, example = found(net)
    space = by_name(spaces)["conv"]
    assert space.trimmable, space.pinned
    assert space.size == 4, "a slot holds a channel of each group"
    assert [condition.sizes for condition in space.conditions] == [(2,)]
    proof = csgd.prove(net, spaces, {"conv": [[0, 2], [1, 3]]}, example)
    assert proof.exact
    assert proof.change <= 1e-12
    assert proof.control >= 1e-3
    space.conditions.clear()
    assert not csgd.prove(net, spaces, {"conv": [[0, 1, 2], [3]]}, example).exact


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
        (lambda x, m: F.layer_norm(x.view(2, 2, 4, 64), (4, 64)).view_as(x), "its trial trim raises in eval mode"),
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


class Normed(nn.Module):
    """Blocks x + f(norm(x)) at several widths, as a ConvNeXt has them."""

    def __init__(self, widths=(40, 80, 20, 12)):
        super().__init__()
        self.stem, self.head = nn.Linear(3, widths[0]), nn.Linear(widths[-1], 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)) for n in widths
        )
        self.steps = nn.ModuleList(nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b)) for a, b in pairwise(widths))

    def forward(self, x):
        x = self.stem(x)
        for block, step in zip(self.blocks, [*self.steps, self.head], strict=True):
            x = step(x + block(x))
        return x


def test_a_trial_leaves_a_norm_enough_channels_to_see_through_it():
    """Of two channels it makes −1 and 1, whatever they are: nothing before it would matter."""
    net, example = Normed(), torch.randn(2, 7, 3)
    assert [space.name for space in csgd.find_spaces(net, example) if not space.trimmable] == ["head"]
    spaces = csgd.find_spaces(net, example, trial=False)
    for seed in range(20):
        clusters = random_clusters(spaces, seed, ratio=None)
        assert all(len(clusters[space.name]) >= 4 for space in spaces if space.trimmable and space.conditions)


def test_the_control_of_one_space_does_not_need_those_that_are_tied_to_it():
    model = nets.UNet()
    spaces, example = found(model)
    trial = Trial(model, spaces, random_clusters(spaces), example)
    assert all(trial.control({name}) > 1e-3 for name in ("enter", "down", "merge"))


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


def masked():
    body = Apply(lambda x, m: x * m.mask)
    body.register_buffer("mask", torch.rand(8, 1, 1))
    return body


def varied(norm):
    """Statistics as training leaves them: different ones for each channel."""
    generator = torch.Generator().manual_seed(0)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return norm


STILL = {
    "frozen batch norm": (
        lambda: varied(FrozenBatchNorm2d(8)),
        {"body.weight", "body.bias", "body.running_mean", "body.running_var"},
    ),
    "momentum 0": (lambda: varied(nn.BatchNorm2d(8, momentum=0.0)), {"body.running_mean", "body.running_var"}),
    "a buffer": (masked, {"body.mask"}),
    "a frozen layer": (lambda: nn.Conv2d(8, 8, 1).requires_grad_(False), {"body.weight", "body.bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STILL)
def test_what_training_does_not_change_is_a_condition_that_csgd_refuses_and_no_pin(name):
    make, still = STILL[name]
    net = Net(make())
    spaces, example = found(net)
    space = next(space for space in spaces if space.conditions)
    assert all(space.trimmable for space in spaces[:-1])
    (condition,) = space.conditions
    assert condition.kind is Kind.ONLY_COLLAPSE
    assert set(condition.tensors) == still
    proof = csgd.prove(net, spaces, random_clusters(spaces), example)
    assert proof.exact
    assert proof.change <= 1e-12
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    with pytest.raises(InputError) as refusal:
        csgd.param_groups(net, spaces, clusters, centri_strength=0.1)
    line = str(refusal.value)
    assert "\n" not in line
    assert all(tensor in line for tensor in still)
    assert f"csgd.Collapse makes them so, or leave {space.name} out of the clusters" in line
    others = {name: parts for name, parts in clusters.items() if name != space.name}
    csgd.param_groups(net, spaces, others, centri_strength=0.1)
    equal = copy.deepcopy(net)
    csgd.merge_equal(equal, spaces, clusters)
    csgd.param_groups(equal, spaces, clusters, centri_strength=0.1)  # nothing is left to be brought about
    state = equal.state_dict() | {tensor: net.state_dict()[tensor] for tensor in still}
    equal.load_state_dict(state)
    with pytest.raises(InputError, match=r"training does not change it: csgd.Collapse does, or keep its layer whole"):
        csgd.trim(equal, spaces, clusters)


def test_all_that_csgd_does_not_reach_is_refused_at_once():
    frozen = varied(nn.BatchNorm2d(8, momentum=0.0))
    net = Net(nn.Sequential(frozen, nn.ReLU(), nn.Conv2d(8, 8, 1).requires_grad_(False), varied(FrozenBatchNorm2d(8))))
    spaces, _ = found(net)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    with pytest.raises(InputError, match=r"body.0.running_mean, .*body.2.weight, .*or leave conv, body.2 out of the"):
        csgd.param_groups(net, spaces, clusters, centri_strength=0.1)


def test_runs_leave_whole_what_csgd_does_not_reach_and_what_is_tied_to_it():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other, self.free = varied(FrozenBatchNorm2d(8)), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            return self.free(F.group_norm(torch.cat([self.norm(x), self.other(torch.tanh(x))], 1), 2))

    net = Net(Frozen())
    assert all(space.trimmable for space in found(net)[0][:-1])
    spaces = by_name(spaces_of(net, torch.randn(nets.IMAGES)))
    assert [name for name, space in spaces.items() if space.trimmable] == ["body.free"]
    assert spaces["conv"].pinned == ["training does not change body.norm.weight, body.norm.bias and 2 more"]
    assert "conv, whose clusters must have the same size, must stay" in spaces["body.other"].pinned[0]


def of_width(size):
    return nn.Sequential(nn.Linear(4, size), nn.LayerNorm(size), nn.GELU(), nn.Linear(size, 3))


@pytest.mark.parametrize(
    "deps, options, asked, width",
    [
        (0.5, {}, 12, 12),
        (5 / 8, {}, 15, 12),
        (0.75, {}, 18, 24),  # of two as near the larger
        (0.3, {}, 7, 8),
        (0.01, {}, 2, 2),
        (0.01, {"min_width": 5}, 5, 6),
        (0.5, {"keep": ["0"]}, 24, 24),
        ([9], {}, 9, 8),
        ({"0": 7}, {}, 7, 8),
        (0.3, {"after": {"0": 12}}, 7, 6),  # not 8: clusters of two cannot become clusters of three
        (0.9, {"after": {"0": 12}}, 21, 12),
    ],
)
def test_the_nearest_width_that_clusters_of_one_size_can_have(caplog, deps, options, asked, width):
    spaces, _ = found(of_width(24), torch.randn(2, 4))
    assert csgd.target_widths(spaces, deps, **options) == {"0": width}
    said = [f"widths that clusters of one size can have: 0 {width} of 24 ({asked} asked for)"]
    assert caplog.messages == (said if asked != width else [])


def test_tied_spaces_get_one_size():
    spaces, _ = found(nets.UNet())
    assert csgd.target_widths(spaces, 0.5) == {"enter": 4, "down": 8, "merge": 3}
    assert csgd.target_widths(spaces, {"down": 0.25}) == {"enter": 2, "down": 4, "merge": 6}, "the nearest together"
    assert csgd.target_widths(spaces, 0.25, keep=["enter"]) == {"enter": 8, "down": 16, "merge": 2}


@pytest.mark.parametrize("method", csgd.clusters.METHODS)
def test_every_method_makes_clusters_of_one_size_within_groups(method):
    model = nets.UNet()
    spaces, example = found(model)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), method)
    assert {len(members) for name in ("enter", "down") for members in clusters[name]} == {2}
    assert all(len({slot // 4 for slot in members}) == 1 for members in clusters["down"])
    assert csgd.prove(model, spaces, clusters, example).exact


def test_widths_that_clusters_of_one_size_cannot_have_are_refused():
    model = of_width(12)
    spaces, _ = found(model, torch.randn(2, 4))
    with pytest.raises(InputError, match=r"widths.0 must be 12, 6, 4, 3, 2, got 5: clusters of one size, 2, 3, 4 or 6"):
        csgd.cluster(model, spaces, {"0": 5})
    model = nets.UNet()
    spaces, _ = found(model)
    with pytest.raises(
        InputError, match=r"clusters.enter: clusters of one size .*, the same in 2 spaces \(group_norm in"
    ):
        csgd.cluster(model, spaces, {"enter": 4})


def inertia(rows, clusters):
    return sum(float(np.square(rows[members] - rows[members].mean(0)).sum()) for members in clusters)


@pytest.mark.parametrize("size", [2, 4])
def test_balanced_clusters_lie_far_below_random_ones_and_not_far_above_free_ones(size):
    torch.manual_seed(0)
    model = of_width(96)
    with torch.no_grad():  # directions that some channels share, and noise, as filters of trained layers have
        model[0] = nn.Linear(40, 96)
        model[0].weight.copy_(torch.randn(96, 6) @ torch.randn(6, 40) + 0.3 * torch.randn(96, 40))
    spaces, _ = found(model, torch.randn(2, 40))
    rows = model[0].weight.detach().double().numpy()
    clusters = csgd.cluster(model, spaces, {"0": 96 // size})["0"]
    assert {len(members) for members in clusters} == {size}
    free = KMeans(96 // size, n_init=3, random_state=0).fit(rows).inertia_
    drawn = np.mean([inertia(rows, random_clusters(spaces, seed, 1 / size)["0"]) for seed in range(10)])
    assert free < inertia(rows, clusters) < 1.25 * free
    assert inertia(rows, clusters) < 0.5 * drawn
    assert clusters == csgd.cluster(model, spaces, {"0": 96 // size})["0"]


def test_balanced_clusters_find_planted_pairs_in_the_groups_of_a_group_norm():
    model = nets.UNet()
    spaces, _ = found(model)
    pairs = [[0, 2], [1, 3], [4, 7], [5, 6]]
    with torch.no_grad():
        for a, b in pairs:
            model.enter.weight[b] = model.enter.weight[a] + 1e-3 * torch.randn(3, 3, 3)
    assert csgd.cluster(model, spaces, {"enter": 4, "down": 8})["enter"] == pairs


class Published(nn.Module):
    """Batch norms whose statistics training does not change: one of momentum 0 that stays in eval mode, one frozen."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), varied(nn.BatchNorm2d(16, momentum=0.0))
        self.conv2, self.norm2, self.fc = nn.Conv2d(16, 16, 3), varied(FrozenBatchNorm2d(16)), nn.Linear(16, 5)

    def train(self, mode=True):
        super().train(mode)
        self.norm1.eval()
        return self

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.fc(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


@pytest.mark.parametrize("net", [nets.ConvNext, Published])
def test_after_200_steps_of_training_with_collapse_the_cut_moves_the_logits_by_rounding_alone(net):
    digits, labels = load_digits(n_class=5, return_X_y=True)
    images, labels = torch.tensor(digits).float().view(-1, 1, 8, 8).repeat(1, 3, 1, 1) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = net()
    spaces = csgd.find_spaces(model, images[:4])
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), of="outputs", data=images[:256].split(64))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    collapse = csgd.Collapse(optimizer, model.train(), spaces, clusters, stop=180)
    for step in range(200):
        batch = torch.randint(600, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    assert collapse.done
    before = model.eval()(images[600:]).detach()
    csgd.trim(model, spaces, clusters, optimizer)
    after, spread = model(images[600:]).detach(), before.amax(1) - before.amin(1)
    assert sum(len(parts) for parts in clusters.values()) <= sum(space.size for space in spaces[:-1]) // 2
    assert float(((after - before).abs().amax(1) / spread).max()) <= 2e-6
    assert float((after.argmax(1) == labels[600:]).float().mean()) >= 0.8

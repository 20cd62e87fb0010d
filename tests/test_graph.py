import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import csgd
from csgd.graph.labels import UnionFind
from csgd.trial import random_clusters
from tests import nets


def spaces_of(net, shape=nets.IMAGES, trial=True):
    return {space.name: space for space in csgd.find_spaces(net, torch.randn(shape), trial)}


def tensors(space, role):
    return {f"{path}.{attribute}" for ref in space.refs if ref.role == role for path, attribute in ref.owners}


@pytest.mark.parametrize("net", nets.EXAMPLES)
def test_every_space_of_every_kind_of_network_is_cut_exactly(net):
    torch.manual_seed(1)
    model, example = net(), nets.example_of(net)
    spaces = csgd.find_spaces(model, example)
    free = {space.name for space in spaces if space.trimmable}
    assert free == {space.name for space in csgd.find_spaces(model, example, trial=False) if space.trimmable}
    assert free
    for seed in range(3):
        proof = csgd.prove(model, spaces, random_clusters(spaces, seed), example)
        assert proof.exact
        assert None not in proof.changes.values()
        assert proof.change <= 1e-12
        assert proof.control > 1e-3, "unequal members must show"


@pytest.mark.parametrize(
    "net, free, whole",
    [
        (nets.Plain, {"conv1", "conv2", "fc1"}, {"fc2"}),
        (nets.Residual, {"stem", "inner", "squeeze"}, {"fc"}),
        (nets.Depthwise, {"expand", "project"}, {"fc"}),
        (nets.Dense, {"conv1", "conv2", "conv3"}, {"fc"}),
        (nets.Grouped, {"conv1", "grouped", "conv3"}, {"fc"}),
        (nets.Transposed, {"down", "up", "up2", "shuffle"}, {"conv"}),
        (nets.Mlp, {"layers.1", "layers.4"}, {"layers.6"}),
        (nets.Transformer, {"embed", "attention", "up"}, {"attention#heads", "head"}),
        (nets.Tied, {"stem", "left"}, {"fc"}),
        (nets.Auxiliary, {"conv1", "conv2"}, {"fc", "aux"}),
    ],
)
def test_names_and_trimmable_layers(net, free, whole):
    spaces = csgd.find_spaces(net(), nets.example_of(net))
    assert {space.name for space in spaces if space.trimmable} == free
    assert {space.name for space in spaces if space.pinned} == whole


def test_pacesetter_followers_and_consumers():
    spaces = spaces_of(nets.Residual())
    stem = spaces["stem"]
    assert tensors(stem, "out") == {"stem.weight", "outer.weight", "excite.weight"}
    assert tensors(stem, "follow") == {"stem.bias", "outer.bias", "excite.bias", ".gamma"}
    assert tensors(stem, "in") == {"inner.weight", "squeeze.weight", "fc.weight"}
    assert stem.producers[0].owners == [("stem", "weight")]
    plain = spaces_of(nets.Plain())
    assert tensors(plain["conv1"], "follow") == {
        "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "act.weight",
    }  # fmt: skip
    assert tensors(spaces_of(nets.Depthwise())["expand"], "follow") >= {"depthwise.weight", "widen.weight"}


def test_slots_and_lanes():
    plain = spaces_of(nets.Plain())
    into_fc = next(ref for ref in plain["conv2"].refs if ref.owners == [("fc1", "weight")])
    assert into_fc.dim == 1
    assert into_fc.index.tolist() == [list(range(16 * c, 16 * c + 16)) for c in range(6)]
    grouped = spaces_of(nets.Grouped())
    assert grouped["conv1"].size == 6, "two groups of six: a slot holds a channel of each"
    assert grouped["conv1"].producers[0].index.tolist() == [[c, c + 6] for c in range(6)]
    dense = spaces_of(nets.Dense())
    offset = next(ref for ref in dense["conv2"].refs if ref.owners == [("bn4", "weight")])
    assert offset.index.flatten().tolist() == [6, 7, 8, 9]


def test_a_tied_weight_is_one_tensor_with_two_owners():
    left = spaces_of(nets.Tied())["left"]
    assert left.producers[0].owners == [("left", "weight"), ("right", "weight")]


class Net(nn.Module):
    """conv → body → linear; the body is what a test is about."""

    def __init__(self, body, channels=8, out=8):
        super().__init__()
        self.conv, self.body, self.last = nn.Conv2d(3, channels, 3, padding=1), body, nn.Conv2d(out, 5, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.body(self.conv(x)))).mean((2, 3))


class Apply(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(x, self)


def scripted(x, _):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in the wild
        return torch.jit.script(_channel_sum)(x)


def _channel_sum(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum(1, keepdim=True)


def write_in_place(x, _):
    x = x.clone()
    x[:, 0] = 1.0
    return x


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x, _: F.softmax(x, 1), "softmax: runs over the channels"),
        (lambda x, _: F.normalize(x), "normalize: runs over the channels"),
        (lambda x, _: x / x.var(1, keepdim=True), "var: runs over the channels"),
        (lambda x, _: x / x.norm(dim=1, keepdim=True), "norm: runs over the channels"),
        (lambda x, _: x / x.abs().sum(1, keepdim=True), "sum: runs over the channels"),
        (lambda x, _: F.local_response_norm(x, 3), "no rule for local_response_norm"),
        (lambda x, _: x.cumsum(1), "cumsum: runs over the channels"),
        (lambda x, _: x.cummax(1)[0], "no rule for cummax"),
        (lambda x, _: torch.einsum("bchw,cd->bdhw", x, torch.eye(8)), "no rule for einsum"),
        (lambda x, _: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], "getitem: picks channels"),
        (lambda x, _: x.roll(1), "no rule for roll"),
        (lambda x, _: x * torch.arange(8.0).view(1, 8, 1, 1), "meets what the network's code makes by arange"),
        (write_in_place, "no rule for setitem"),
        (lambda x, _: x + torch.from_numpy(x.numpy() * 0), "no rule for numpy"),
        (lambda x, _: torch.tensor(x.tolist()), "no rule for tolist"),
        (scripted, "runs in compiled code"),
        (lambda x, _: x / x.shape[1], "its trial trim changes the output"),
        (lambda x, _: x.view(-1, 8, 8, 8), "its trial trim raises in eval mode: body: RuntimeError: shape '[-1, 8"),
        (lambda x, _: x.sort(1).values, "no rule for sort"),
        (lambda x, _: x.view(2, 2, 4, 8, 8).mean(1).repeat(1, 2, 1, 1), "no rule for repeat"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_exactly_is_pinned_with_its_reason(function, reason):
    space = spaces_of(Net(Apply(function)))["conv"]
    assert not space.trimmable
    assert reason in "; ".join(space.pinned)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, _: x.relu_().mul_(2.0).add_(1.0),
        lambda x, _: F.group_norm(x, x.size(1)),
        lambda x, _: torch.stack(list(x)),
        lambda x, _: x * torch.ones(8, 8),
        lambda x, _: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x, _: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x, _: x.transpose(1, 3).transpose(1, 3),
        lambda x, _: x * torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=x.dtype),
        lambda x, _: F.interpolate(x, scale_factor=2.0),
        lambda x, _: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x, _: torch.where(x > 0, x, 0.1 * x),
        lambda x, _: torch.as_tensor(x),
        lambda x, _: torch.stack([x, x.tanh()], 1).softmax(1).sum(1) * torch.stack([x, x + 1.0], 1).mean(1),
        lambda x, _: F.layer_norm(x, x.shape[3:]),
        lambda x, _: x[:, :, ::2, ::2],
        lambda x, _: torch.cat([x, x.tanh()], 2),
        lambda x, _: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x, _: x.flatten(2).softmax(2).unflatten(2, (8, 8)),
    ],
)
def test_what_treats_every_channel_alike_leaves_them_free(function):
    net = Net(Apply(function))
    spaces = csgd.find_spaces(net, torch.randn(nets.IMAGES))
    assert spaces[0].trimmable, spaces[0].pinned
    assert csgd.prove(net, spaces, random_clusters(spaces), torch.randn(nets.IMAGES)).change <= 1e-12


def test_zero_padded_shortcuts_pin_only_what_they_touch():
    def body(x, m):
        return F.pad(x, (0, 0, 0, 0, 0, 4)) + m.wide(x)

    net = Net(Apply(body, wide=nn.Conv2d(8, 12, 1)), out=12)
    spaces = spaces_of(net)
    assert spaces["conv"].trimmable
    assert {f"{p}" for ref in spaces["conv"].producers for p, _ in ref.owners} == {"conv", "body.wide"}
    pinned = next(space for name, space in spaces.items() if name.startswith("body.wide"))
    assert "zero-padded channels" in pinned.pinned


def test_one_module_in_several_spaces_gets_numbered_names():
    def body(x, m):
        return torch.cat([m.a(x), m.b(x)], 1) + m.both(x)

    net = Net(Apply(body, a=nn.Conv2d(8, 5, 1), b=nn.Conv2d(8, 7, 1), both=nn.Conv2d(8, 12, 1)), out=12)
    spaces = spaces_of(net)
    assert {"body.a", "body.b"} <= spaces.keys()
    split = Net(Apply(lambda x, m: m.both(x) + torch.cat([x[:, :0], x, F.relu(m.b(x))], 1),
                      both=nn.Conv2d(8, 12, 1), b=nn.Conv2d(8, 4, 1)), out=12)  # fmt: skip
    first = Apply(lambda x, m: torch.cat(m.both(x).split([4, 8], 1), 1), both=nn.Conv2d(8, 12, 1))
    assert not spaces_of(Net(first, out=12))["body.both"].trimmable
    assert all(space.size for space in spaces_of(split).values())


def test_computed_weights_and_uncalled_layers_are_listed():
    net = Net(Apply(lambda x, m: m.normed(x), normed=spectral_norm(nn.Conv2d(8, 8, 1)), unused=nn.Conv2d(8, 8, 1)))
    spaces = spaces_of(net)
    assert spaces["body.normed"].pinned == ["its weight is computed, not a plain parameter"]
    assert spaces["body.unused"].pinned == ["not called as a layer in the forward pass"]
    assert "its weight is not a plain parameter" in "; ".join(spaces["conv"].pinned)


def test_a_weight_used_as_a_value_freezes_it():
    def body(x, m):
        return F.conv2d(x, m.inner.weight * 2.0)

    spaces = spaces_of(Net(Apply(body, inner=nn.Conv2d(8, 8, 1, bias=False))))
    assert not spaces["conv"].trimmable
    assert spaces["body.inner"].pinned == ["parameter used outside conv, linear and norm layers"]


def test_the_model_is_left_as_it_was_found():
    model = nets.Plain()
    model.bn1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    example = torch.randn(nets.IMAGES, generator=torch.Generator().manual_seed(0))
    csgd.find_spaces(model, example)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_several_inputs_and_structured_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x, y):
            hidden = F.relu(self.a(x) + self.b(y))
            return {"logits": self.fc(hidden), "hidden": [hidden.tanh()]}

    example = (torch.randn(2, 4), torch.randn(2, 6))
    spaces = csgd.find_spaces(Two(), example)
    assert spaces[0].pinned == ["network output"], "hidden is returned, so it must stay"


class Output(dict):
    """A class of its own, as model zoos return."""


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


class Looped:
    def __init__(self, logits):
        self.logits, self.me = logits, self


@pytest.mark.parametrize("wrap", [lambda x: Output(x=x), Slotted, Looped, lambda x: {0: [(x,)]}])
def test_outputs_are_found_in_containers_of_any_class(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(Apply(lambda x, _: x.relu()))

        def forward(self, x):
            return wrap(self.net(x))

    spaces = spaces_of(Wrapped())
    assert spaces["net.conv"].trimmable
    assert spaces["net.last"].pinned == ["network output"]


def test_a_model_that_returns_no_tensor_is_refused():
    with pytest.raises(csgd.InputError, match="returns no tensor that can be found"):
        csgd.find_spaces(Apply(lambda x, _: None), torch.randn(nets.IMAGES))


@pytest.mark.parametrize("mask", [torch.arange(8).view(8, 1, 1), torch.arange(8).view(8, 1, 1) > 3])
def test_whole_numbers_and_masks_for_each_channel_pin(mask):
    body = Apply(lambda x, m: x * m.mask)
    body.register_buffer("mask", mask)
    assert not spaces_of(Net(body))["conv"].trimmable


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_are_not_saved_are_cut_like_others(persistent):

    def centred(x, m):
        if m.training:
            m.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return x - m.mean.view(-1, 1, 1)

    body = Apply(centred)
    body.register_buffer("mean", torch.zeros(8), persistent)
    space = spaces_of(Net(body))["conv"]
    assert space.trimmable
    assert ("body", "mean") in {owner for ref in space.refs for owner in ref.owners}


def _made(n, width):
    return torch.outer(torch.arange(n), 0.5 ** torch.arange(width)).sin()


class Places(nn.Module):
    """Adds positions from a table that grows where an input is longer; `grow` says how."""

    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("table", _made(64, 8), persistent)

    def forward(self, x):
        x = x.flatten(2).mT
        if x.size(1) > len(self.table):
            self.grow(*x.shape[1:])
        return (x * self.table[: x.size(1)]).mT.unflatten(2, (-1, 4))


class Assigned(Places):
    def grow(self, n, width):
        self.table = _made(n, width)


class Registered(Places):
    def grow(self, n, width):
        self.register_buffer("table", _made(n, width), persistent=False)


class SetByName(Places):
    def grow(self, n, width):
        setattr(self, "table", _made(n, width))  # noqa: B010


class InTheDict(Places):
    def grow(self, n, width):
        self._buffers["table"] = _made(n, width)


class Nested(Places):
    def grow(self, n, width):
        def longer():
            self.table = _made(n, width)

        longer()


class ByProperty(Places):
    def grow(self, n, width):
        self.length = n

    @property
    def length(self):
        return len(self.table)

    @length.setter
    def length(self, n):
        self.table = _made(n, 8)


class ByAnother(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.places = Places(persistent)

    def forward(self, x):
        if x[0, 0].numel() > len(self.places.table):
            self.places.table = _made(x[0, 0].numel(), x.size(1))
        return self.places(x)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("way", [Assigned, Registered, SetByName, InTheDict, Nested, ByProperty, ByAnother])
def test_a_table_that_grows_with_its_input_pins(way, persistent):
    """What the code makes of a longer input has the width of the cut, and other entries than those that were kept."""
    assert spaces_of(Net(way(persistent)))["conv"].pinned == ["meets a buffer that the network's code may make anew"]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(())])
def test_blocks_left_out_at_random_are_seen_whatever_was_drawn_before(draw):
    def body(x, m):
        for block in (m.a, m.b, m.c):
            if not m.training or draw() < 0.5:
                x = x + block(x)
        return x

    blocks = {name: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)) for name in "abc"}
    net = Net(Apply(body, **blocks))
    for seed in range(8):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        free = {name for name, space in spaces_of(net, trial=False).items() if space.trimmable}
        assert free == {"conv", "body.a.0", "body.b.0", "body.c.0"}


def test_frozen_members_cannot_become_equal():
    model = nets.Plain()
    model.conv1.requires_grad_(False)
    spaces = csgd.find_spaces(model, nets.example_of(nets.Plain))
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5))
    with pytest.raises(csgd.InputError, match="conv1.weight, conv1.bias: not trained, so their rows cannot"):
        csgd.param_groups(model, spaces, clusters, centri_strength=0.1)


@pytest.mark.parametrize("channels", [2, 8])
@pytest.mark.parametrize(
    "function, inputs",
    [
        (lambda x, m: F.channel_shuffle(torch.stack([x, m.a(x)], 2).flatten(1, 2), 2), 2),
        (lambda x, m: torch.stack([x, m.a(x)], 2).flatten(1, 2), 2),
        (lambda x, m: torch.stack([x, m.a(x)], 1).flatten(1, 2), 2),
        (lambda x, m: torch.cat([x, m.a(x)], 2), 1),
        (lambda x, m: torch.cat([x, m.a(x.mean((2, 3), keepdim=True)).expand_as(x)], 1), 2),
        (lambda x, m: torch.cat([x, m.a(x.mean((2, 3), keepdim=True)).expand(x.shape)], 1), 2),
        (lambda x, m: x / x.shape[1], 1),
        (lambda x, m: F.conv_transpose2d(m.a(x), m.a.weight, padding=1), 1),
        (lambda x, m: x + x.new_empty(x.size(0), 1, 1, 1).fill_(0.5), 1),
        (lambda x, m: m.a(x).unsqueeze(-1).squeeze_(-1), 1),
        (lambda x, m: x.mean(axis=(2, 3), keepdim=True) * x, 1),
    ],
)
def test_whatever_is_called_trimmable_is_cut_exactly_at_any_widths(function, inputs, channels):
    body = Apply(function, a=nn.Conv2d(channels, channels, 3, padding=1))
    net, example = Net(body, channels, inputs * channels), torch.randn(nets.IMAGES)
    spaces = csgd.find_spaces(net, example)
    for seed in range(12 if any(space.trimmable for space in spaces) else 0):
        assert csgd.prove(net, spaces, random_clusters(spaces, seed, ratio=None), example).change <= 1e-12


def test_odd_networks_do_not_stop_the_analysis():
    class OneDtype(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.empty = Net(Apply(lambda x, _: x.relu())), nn.Parameter(torch.zeros(0, 4))

        def forward(self, x):
            assert x.dtype == torch.float32
            return self.net(x)

    assert spaces_of(OneDtype())["net.conv"].trimmable
    positive = Apply(lambda x, m: x * m.scale.log().view(-1, 1, 1))
    positive.scale = nn.Parameter(torch.full((8,), 2.0))
    assert spaces_of(Net(positive))["conv"].trimmable, "random weights would make it NaN"


def test_whatever_a_forward_pass_changes_the_model_stays():
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last, self.calls = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), 0
            self.register_buffer("mean", torch.zeros(8))
            self.constant = torch.ones(8, 8)

        def forward(self, x):
            y = self.conv(x)
            if self.training:
                self.mean = 0.9 * self.mean + y.mean((0, 2, 3))
                self.calls += 1
                self.last.weight.requires_grad_(False)
            random.random(), np.random.rand()
            return self.last(y * self.constant.to(y))

    model, example = Restless(), torch.randn(nets.IMAGES)
    states, before = (random.getstate(), np.random.get_state()[2]), example.clone()
    csgd.find_spaces(model, example)
    assert (model.mean == 0).all()
    assert model.calls == 0
    assert model.last.weight.requires_grad
    assert not hasattr(model.constant, "_csgd_labels")
    assert not hasattr(example, "_csgd_labels")
    assert torch.equal(example, before)
    assert states == (random.getstate(), np.random.get_state()[2])


def test_pin_failures_finds_the_one_space_that_fails():
    def body(x, m):
        x = F.relu(m.first(x))
        return m.third(F.relu(m.second(x)) / x.shape[1])

    net = Net(Apply(body, first=nn.Conv2d(8, 8, 1), second=nn.Conv2d(8, 8, 1), third=nn.Conv2d(8, 8, 1)))
    example = torch.randn(nets.IMAGES)
    spaces = csgd.find_spaces(net, example, trial=False)
    assert all(space.trimmable for space in spaces[:-1])
    csgd.pin_failures(net, spaces, example)
    assert [space.name for space in spaces if not space.trimmable] == ["body.first", "last"]


def test_labels_of_many_entries_have_the_same_representatives_as_few():
    """Where there are more entries than atoms, all atoms are looked up first: after unions in any order."""
    generator = torch.Generator().manual_seed(0)
    few, many = UnionFind(), UnionFind()
    for ties in (few, many):
        ties.grow(40)
    for _ in range(30):
        a, b = torch.randint(40, (2, 3), generator=generator)
        few.union(a, b)
        many.union(a, b)
        roots = [int(few.find(torch.tensor([atom]))) for atom in range(40)]
        assert many.find(torch.arange(40).repeat(2)).tolist() == 2 * roots

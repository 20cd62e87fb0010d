"""Picks of channels by number, tensors made for as many channels, embeddings, outputs that count, and taught rules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import nms

import csgd
from csgd.graph.rules import RULES
from csgd.trial import random_clusters
from csgd.verify import count_macs

IMAGES, WORDS, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 16), torch.randint(0, 20, (2, 4))


class Net(nn.Module):
    """Any forward pass over layers, parameters, buffers and integers."""

    def __init__(self, way, **parts):
        super().__init__()
        self.way = way
        for name, part in parts.items():
            plain = isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter)
            self.register_buffer(name, part) if plain else setattr(self, name, part)

    def forward(self, x):
        return self.way(self, x)


def conv(ins, outs, **how):
    return nn.Conv2d(ins, outs, 3, padding=1, **how)


def head(ins):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ins, 5))


def learned(*shape):
    return nn.Parameter(torch.randn(*shape))


def inner(net, x, **how):
    return [space for space in csgd.find_spaces(net, x, **how) if "network output" not in space.pinned]


def check_exact(net, x, *, free, **how):
    """Proves random clusters of all spaces, of which so many slots are free, and cuts the network itself."""
    spaces = csgd.find_spaces(net, x, **how)
    assert sum(space.size for space in spaces if space.trimmable) == free, spaces
    for seed in range(2):
        clusters = random_clusters(spaces, seed=seed, ratio=(0.5, None)[seed])
        proof = csgd.prove(net, spaces, clusters, x, **how)
        assert proof.exact, proof
        assert proof.change <= 1e-12
        assert proof.control >= 1e-3
    narrow = copy.deepcopy(net).double().eval()
    given = x.double() if x.is_floating_point() else x
    csgd.merge_equal(narrow, spaces, clusters)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        wide = narrow(given)
        csgd.trim(narrow, spaces, clusters)
        torch.manual_seed(0)
        assert csgd.proof.largest_change([wide], [narrow(given)]) <= 1e-12 or "outputs" in how
    finally:
        torch.set_default_dtype(torch.float32)
    return spaces, clusters, narrow


# picks


def res2(net, x):
    parts, out, y = net.a(x).split(net.width, 1), [], None
    for part, layer in zip(parts[1:], (net.b, net.c), strict=True):
        y = layer(part if y is None else y + part).relu()
        out.append(y)
    return net.h(torch.cat([parts[0], *out], 1))


def c2f(net, x):
    parts = list(net.a(x).split((net.c, net.c), 1))
    parts.append(parts[-1] + net.b(parts[-1]))
    return net.h(torch.cat(parts, 1))


def csp(net, x):
    beside, through = net.a(x).split(net.expand // 2, dim=1)
    return net.h(torch.cat([beside, net.b(through)], 1))


def gated(net, x):
    gate, still, mixed = torch.split(net.a(x), net.parts, dim=1)
    return net.h(net.b(gate.relu() * torch.cat([still, net.d(mixed)], 1)))


def partial(net, x):
    first, rest = torch.split(net.a(x), [net.k, net.rest], dim=1)
    return net.h(torch.cat([net.b(first), rest], 1).relu())


def remaining(net, x):
    y = net.a(x)
    first, rest = torch.split(y, [net.k, y.size(1) - net.k], dim=1)
    return net.h(torch.cat([net.b(first), rest], 1).relu())


def attributes_alone(net, x):
    first, rest = torch.split(net.a(x), [net.k, net.dim - net.k], dim=1)
    return net.h(torch.cat([net.b(first), rest], 1).relu())


def paths(net, x):
    return net.h(torch.stack([part.relu() for part in net.a(x).split(net.dim // net.paths, 1)]).sum(0))


def written(net, x):
    y = net.a(x).clone()
    y[:, : net.k] = net.b(y[:, : net.k])
    return net.h(y.relu())


def written_beside_a_view(net, x):
    y = net.a(x).clone()
    seen = y.flatten(2)
    y[:, : net.k] = net.b(x)
    return net.h(seen.unflatten(2, (8, 8)).relu() + y)


def of_tensor(net, x):
    y = net.a(x)
    middle = y.shape[1] // 2
    return net.h(y[:, :middle] * y[:, middle:])


def quarters(net, x):
    y = net.a(x)
    n = y.size(1) // 4
    return net.h(torch.cat([y[:, :n].relu(), y[:, n : 3 * n], y[:, -n:].tanh()], 1))


def narrowed(net, x):
    y = net.a(x)
    return net.h(y.narrow(1, 0, net.k).mean(1, keepdim=True) * 0 + net.b(y.narrow(1, net.k, y.size(1) - net.k)))


def sums(net, x):
    y = net.a(x)
    return net.h(torch.cat([y[:, : net.k], y[:, net.k : net.k + net.m].relu(), net.b(y[:, net.k + net.m :])], 1))


def chunked(net, x):
    parts = list(net.a(x).chunk(net.parts, 1))
    parts[0] = net.b(parts[0]).tanh()
    return net.h(torch.cat([*parts[:-1], parts[-1].sigmoid()], 1))


def folded(net, x):
    """Shapes of one tensor are typed into views of others."""
    y = net.a(x)
    b, c, _, _ = y.shape
    z = net.b(y).view(b, c, -1).mean(-1)
    return net.h(y * net.c(y).view(b, net.groups, c // net.groups, 8, 8).flatten(1, 2).relu() + z[:, :, None, None])


def folded_otherwise(net, x):
    """The same, where nothing but the shape says that there are as many."""
    y = net.a(x)
    b, c, _, _ = y.shape
    return net.h(net.b(y).reshape(b, c, -1).transpose(1, 2).unflatten(1, (8, 8)).movedim(-1, 1).relu())


PICKS = {
    "Res2Net": (res2, dict(a=conv(3, 24), b=conv(8, 8), c=conv(8, 8), h=head(24), width=8), 16),
    "C2f": (c2f, dict(a=conv(3, 16), b=conv(8, 8), h=head(24), c=8), 8),
    "CSP": (csp, dict(a=conv(3, 16), b=conv(8, 8), h=head(16), expand=16), 16),
    "gated": (gated, dict(a=conv(3, 32), d=conv(6, 6, groups=6), b=conv(16, 8), h=head(8), parts=(16, 10, 6)), 24),
    "partial conv": (partial, dict(a=conv(3, 16), b=conv(6, 6), h=head(16), k=6, rest=10), 22),
    "the rest": (remaining, dict(a=conv(3, 16), b=conv(6, 6), h=head(16), k=6), 22),
    "the rest, by attributes": (attributes_alone, dict(a=conv(3, 16), b=conv(6, 6), h=head(16), k=6, dim=16), 22),
    "paths": (paths, dict(a=conv(3, 24), h=head(8), dim=24, paths=3), 8),
    "written": (written, dict(a=conv(3, 16), b=conv(6, 6), h=head(16), k=6), 16),
    "written beside a view": (written_beside_a_view, dict(a=conv(3, 16), b=conv(3, 6), h=head(16), k=6), 16),
    "halves of the width": (of_tensor, dict(a=conv(3, 16), h=head(8)), 8),
    "quarters of the width": (quarters, dict(a=conv(3, 16), h=head(16)), 4),
    "sums of attributes": (sums, dict(a=conv(3, 16), b=conv(5, 5), h=head(16), k=7, m=4), 21),
    "every other": (lambda n, x: n.h((y := n.a(x))[:, ::2] * y[:, 1::2]), dict(a=conv(3, 16), h=head(8)), 8),
    "rolled by half": (
        lambda n, x: n.h((y := n.a(x)).roll(y.shape[1] // 2, 1) + y.relu()),
        dict(a=conv(3, 16), h=head(16)),
        8,
    ),
    "rolled by a number": (lambda n, x: n.h(n.a(x).roll(3, 1)), dict(a=conv(3, 16), h=head(16)), 13),
    "rolled by an attribute": (lambda n, x: n.h(n.a(x).roll(n.k, 1)), dict(a=conv(3, 16), h=head(16), k=6), 16),
    "rolled back": (
        lambda n, x: n.h(torch.roll(n.a(x), shifts=(1, -n.k), dims=(2, 1))),
        dict(a=conv(3, 16), h=head(16), k=6),
        16,
    ),
    "flipped": (
        lambda n, x: n.h(n.b(n.a(x).flip(1)).relu() + n.a(x)),
        dict(a=conv(3, 16), b=conv(16, 16), h=head(16)),
        16,
    ),
    "flipped beside itself": (
        lambda n, x: n.h((y := n.a(x)) + torch.flip(y, (1, 2))),
        dict(a=conv(3, 16), h=head(16)),
        8,
    ),
    "flipped with others": (
        lambda n, x: n.h(torch.cat([n.a(x), n.b(x)], 1).flatten(1).flip(-1)),
        dict(a=conv(3, 4), b=conv(3, 6), h=nn.Linear(10 * 64, 5)),
        10,
    ),
    "listed": (
        lambda n, x: n.h(torch.cat([(y := n.a(x))[:, [2, 0, 1]].relu(), y], 1)),
        dict(a=conv(3, 16), h=head(19)),
        13,
    ),
    "listed from the end": (
        lambda n, x: n.h(torch.cat([(y := n.a(x))[:, [-1, -3]].relu(), y], 1)),
        dict(a=conv(3, 16), h=head(18)),
        13,
    ),
    "listed in a buffer": (
        lambda n, x: n.h(torch.cat([(y := n.a(x)).index_select(1, n.few), y], 1)),
        dict(a=conv(3, 16), h=head(19), few=torch.tensor([1, 0, 4])),
        11,
    ),
    "one gate": (
        lambda n, x: n.h((s := n.a(x).split([n.k, 1], 1))[0] * s[1].sigmoid()),
        dict(a=conv(3, 16), h=head(15), k=15),
        15,
    ),
    "all but the last": (
        lambda n, x: n.h((y := n.a(x))[:, :-1] * y[:, -1:].sigmoid()),
        dict(a=conv(3, 16), h=head(15)),
        15,
    ),
    "three parts, the last smaller": (chunked, dict(a=conv(3, 22), b=conv(8, 8), h=head(22), parts=3), 22),
    "fewer parts than asked": (chunked, dict(a=conv(3, 12), b=conv(3, 3), h=head(12), parts=5), 6),
    "fewer parts, the last smaller": (chunked, dict(a=conv(3, 40), b=conv(6, 6), h=head(40), parts=7), 16),
    "the width of others": (folded, dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), h=head(8), groups=2), 4),
    "the width of what is read": (folded_otherwise, dict(a=conv(3, 8), b=conv(8, 8), h=head(8)), 16),
    "a lane": (
        lambda n, x: n.h(torch.mul(*(y := n.a(x)).view(2, 2, y.shape[1] // 2, 8, 8).unbind(1))),
        dict(a=conv(3, 16), h=head(8)),
        8,
    ),
}


@pytest.mark.parametrize("name", PICKS)
def test_parts_of_the_channels_are_cut_each_for_itself_and_reload(name):
    way, parts, free = PICKS[name]
    wide = Net(way, **parts)
    _, clusters, narrow = check_exact(wide, IMAGES, free=free)
    expected = narrow(IMAGES.double())
    widths = {space: len(members) for space, members in clusters.items()}
    for how in ({"example": IMAGES}, {}):
        if name in ("sums of attributes", "rolled by an attribute", "rolled back"):
            how["widths"] = widths
        loaded = csgd.load_trimmed(copy.deepcopy(wide), narrow.state_dict(), **how).double().eval()
        assert csgd.proof.largest_change([expected], [loaded(IMAGES.double())]) <= 1e-5


def test_parts_that_shapes_do_not_tell_apart_ask_for_widths():
    def way(net, x):
        first, rest = net.a(x)[:, : net.k], net.a(x)[:, net.k :]
        return net.h(torch.cat([first.relu(), rest], 1))

    wide = Net(way, a=conv(3, 16), h=head(16), k=6)
    _, clusters, narrow = check_exact(wide, IMAGES, free=16)
    with pytest.raises(
        csgd.InputError, match="k counts channels of 'a', and shapes alone do not say how many are left"
    ):
        csgd.load_trimmed(wide, narrow.state_dict(), example=IMAGES)
    widths = {name: len(members) for name, members in clusters.items()}
    loaded = csgd.load_trimmed(wide, narrow.state_dict(), example=IMAGES, widths=widths)
    assert loaded.k == narrow.k == widths["a"]

    wrong = {"a": widths["a"], "a#2": widths["a#2"] + 1}
    for how in ({"example": IMAGES}, {}):
        with pytest.raises(
            csgd.InputError, match=r"widths that do not fit: a.weight of \[.*\] has lost 1 more channel"
        ):
            csgd.load_trimmed(Net(way, a=conv(3, 16), h=head(16), k=6), narrow.state_dict(), widths=wrong, **how)


def test_attributes_that_say_where_parts_lie_follow_and_are_listed():
    way, parts, _ = PICKS["gated"]
    spaces, _, narrow = check_exact(Net(way, **parts), IMAGES, free=24)
    held = {ref.dim for space in spaces for ref in space.refs if ref.role == "size" and ref.owners == [("", "parts")]}
    assert held == {0, 1, 2}
    assert sum(narrow.parts) == narrow.a.out_channels < 32
    assert narrow.parts[0] == narrow.parts[1] + narrow.parts[2] == narrow.b.in_channels
    way, parts, _ = PICKS["CSP"]
    _, _, narrow = check_exact(Net(way, **parts), IMAGES, free=16)
    assert narrow.expand == narrow.a.out_channels == 2 * narrow.b.in_channels < 16


@pytest.mark.parametrize(
    "way",
    [
        lambda n, x: n.h(n.a(x)[:, [1, 0, *range(2, 16)]]),
        lambda n, x: n.h(n.a(x)[:, n.order]),
        lambda n, x: n.h(n.a(x).index_select(1, n.order)),
    ],
)
def test_a_permutation_by_a_list_says_why_all_stays(way):
    net = Net(way, a=conv(3, 16), h=head(16), order=torch.randperm(16))
    (a, *_) = inner(net, IMAGES, trial=False)
    assert a.size == 16
    assert "picks channels by a list of their numbers" in a.pinned[0]


def test_channels_that_are_picked_by_computed_numbers_stay():
    ways = [lambda n, x: n.h((y := n.a(x)).index_select(1, y.mean((0, 2, 3)).topk(4).indices))]
    ways += [lambda n, x: n.h(n.a(x)[:, torch.arange(16) < 4])]
    for way in ways:
        assert not any(space.trimmable for space in inner(Net(way, a=conv(3, 16), h=head(4)), IMAGES, trial=False))


@pytest.mark.parametrize(
    "way",
    [
        lambda n, x: n.h(torch.cat([(y := n.a(x))[:, :8].relu(), y[:, 8:]], 1)),
        lambda n, x: n.h(torch.cat([(s := n.a(x).split([8, 8], 1))[0].relu(), s[1]], 1)),
        lambda n, x: n.h(torch.cat([(y := n.a(x)).narrow(1, 0, 8).relu(), y.narrow(1, 8, 8)], 1)),
    ],
)
def test_numbers_that_are_typed_into_forward_keep_what_they_count(way):
    spaces = inner(Net(way, a=conv(3, 16), h=head(16)), IMAGES)
    assert "by a number that is typed in" in spaces[0].pinned[0]
    assert not spaces[0].trimmable
    untried = inner(Net(way, a=conv(3, 16), h=head(16)), IMAGES, trial=False)
    assert not untried[0].trimmable


def test_a_part_of_the_channels_is_not_mixed_with_another_that_is_read_alike():
    def way(net, x):
        first, rest = torch.split(net.a(x), [net.k, net.rest], dim=1)
        return net.h(torch.cat([first + 1.0, rest], 1))

    spaces = inner(Net(way, a=conv(3, 16), h=head(16), k=6, rest=10), IMAGES)
    assert [space.size for space in spaces] == [6, 10]


def test_an_attribute_of_the_same_value_that_counts_nothing_stays():
    net = Net(PICKS["partial conv"][0], **PICKS["partial conv"][1], images=6)
    _, _, narrow = check_exact(net, IMAGES, free=22)
    assert narrow.images == 6 > narrow.k


class Longest(nn.Module):
    """The largest length and the width are one number; the width is an integer that nothing follows."""

    def __init__(self):
        super().__init__()
        self.dim = self.longest = 8
        self.a, self.h = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = x[:, -self.longest :]
        return self.h(self.a(x).view(-1, int(self.dim)).relu().view(len(x), x.size(1), -1)).sum(1)


def test_an_attribute_of_a_width_that_the_example_does_not_come_near_stays():
    wide, short, long = Longest(), torch.randn(3, 3, 16), torch.randn(2, 12, 16).double()
    _, clusters, narrow = check_exact(wide, short, free=8)
    assert (narrow.dim, narrow.longest) == (narrow.a.out_features, 8)
    same = copy.deepcopy(wide).double()
    csgd.merge_equal(same, csgd.find_spaces(wide, short), clusters)
    cut = copy.deepcopy(same)
    csgd.trim(cut, csgd.find_spaces(wide, short), clusters)
    torch.testing.assert_close(cut(long), same(long))
    for how in ({"example": short.double()}, {"example": long}, {}):  # of the long one any width makes a whole view
        loaded = csgd.load_trimmed(Longest().double(), cut.state_dict(), **how)
        assert (loaded.dim, loaded.longest) == (cut.dim, 8)
        assert torch.equal(loaded(long), cut(long))


class Joined(nn.Module):
    """The same, of the width of two layers side by side."""

    def __init__(self):
        super().__init__()
        self.dim = self.longest = 14
        self.a, self.b, self.h = nn.Linear(16, 8), nn.Linear(16, 6), nn.Linear(14, 5)

    def forward(self, x):
        x = x[:, -self.longest :]
        y = torch.cat([self.a(x), self.b(x)], -1).view(-1, int(self.dim))
        return self.h(y.relu().view(len(x), x.size(1), -1)).sum(1)


def test_an_attribute_that_two_layers_need_is_given_back_whole():
    _, _, narrow = check_exact(Joined(), torch.randn(3, 3, 16), free=14)
    assert (narrow.dim, narrow.longest) == (narrow.a.out_features + narrow.b.out_features, 14)


# whole networks


class LayerNorm2d(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = learned(1, dim, 1, 1), learned(1, dim, 1, 1)

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        return (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * self.weight + self.bias


class NAFBlock(nn.Module):
    """As in NAFNet: norms by hand, a gate of halves, channel attention."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(dim), LayerNorm2d(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, 2 * dim, 1), conv(2 * dim, 2 * dim, groups=2 * dim)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1))
        self.conv3, self.conv4, self.conv5 = (nn.Conv2d(dim, n, 1) for n in (dim, 2 * dim, dim))
        self.beta, self.gamma = learned(1, dim, 1, 1), learned(1, dim, 1, 1)

    def forward(self, x):
        a, b = self.conv2(self.conv1(self.norm1(x))).chunk(2, 1)
        y = x + self.conv3(a * b * self.sca(a * b)) * self.beta
        a, b = self.conv4(self.norm2(y)).chunk(2, 1)
        return y + self.conv5(a * b) * self.gamma


class PLKBlock(nn.Module):
    """As in PLKSR: a large kernel over the first channels, written in place in eval mode, split in train mode."""

    def __init__(self, dim):
        super().__init__()
        self.mixer, self.idx = nn.Sequential(conv(dim, 2 * dim), nn.GELU(), nn.Conv2d(2 * dim, dim, 1)), dim // 4
        self.large, self.refine = nn.Conv2d(self.idx, self.idx, 5, padding=2), nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        y = self.mixer(x)
        if self.training:
            first, rest = torch.split(y, [self.idx, y.size(1) - self.idx], dim=1)
            y = torch.cat([self.large(first), rest], 1)
        else:
            y[:, : self.idx] = self.large(y[:, : self.idx])
        return x + self.refine(y)


class C2f(nn.Module):
    """As in YOLO v8: halves, of which one goes on through bottlenecks, all joined."""

    def __init__(self, ins, outs, n=2):
        super().__init__()
        self.c = outs // 2
        self.cv1, self.cv2 = nn.Conv2d(ins, 2 * self.c, 1), nn.Conv2d((2 + n) * self.c, outs, 1)
        self.m = nn.ModuleList(
            nn.Sequential(conv(self.c, self.c), nn.BatchNorm2d(self.c), nn.SiLU(), conv(self.c, self.c))
            for _ in range(n)
        )

    def forward(self, x):
        parts = list(self.cv1(x).split((self.c, self.c), 1))
        for block in self.m:
            parts.append(parts[-1] + block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


NETWORKS = {
    "NAFNet": lambda: nn.Sequential(conv(3, 16), NAFBlock(16), NAFBlock(16), conv(16, 3)),
    "PLKSR": lambda: nn.Sequential(conv(3, 16), PLKBlock(16), PLKBlock(16), conv(16, 12), nn.PixelShuffle(2)),
    "C2f": lambda: nn.Sequential(conv(3, 16), C2f(16, 24), conv(24, 32, stride=2), C2f(32, 32), head(32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_such_blocks_lose_most_of_their_cost(name):
    net = NETWORKS[name]()
    spaces = csgd.find_spaces(net, IMAGES)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 1 / 2))
    proof = csgd.prove(net, spaces, clusters, IMAGES)
    assert proof.exact, proof
    assert proof.change <= 1e-12
    narrow = copy.deepcopy(net)
    csgd.trim(narrow, spaces, clusters, tolerance=None)
    assert count_macs(narrow, IMAGES) <= 0.4 * count_macs(net, IMAGES)
    loaded = csgd.load_trimmed(NETWORKS[name](), narrow.state_dict(), example=IMAGES)
    assert torch.equal(loaded.eval()(IMAGES), narrow.eval()(IMAGES))


# tensors that are made for as many channels


def gru(net, x, start):
    features, state = net.a(x), start
    for _ in range(2):
        state = torch.tanh(net.b(torch.cat([features, state], 1)))
    return net.h(state)


class ConvLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.conv, self.head = 8, conv(3 + 8, 32), head(8)

    def forward(self, x):
        h, c = (torch.zeros(x.size(0), self.hidden, *x.shape[2:]) for _ in range(2))
        for _ in range(2):
            i, f, o, g = torch.split(self.conv(torch.cat([x, h], 1)), self.hidden, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def unpool(net, x):
    y, places = F.max_pool2d(net.a(x), 2, return_indices=True)
    return net.h(F.max_unpool2d(net.b(y), places, 2))


def filled(net, x):
    y = net.a(x)
    out = y.new_zeros(2, y.size(1), 8, 8)
    out[:, :, 2:] = y[:, :, :-2]
    return net.h(net.b(out).relu())


two = dict(a=conv(3, 16), b=conv(16, 16), h=head(16))


@pytest.mark.parametrize(
    "way, parts, why",
    [
        (chunked, dict(a=conv(3, 15), b=nn.Identity(), h=head(15), parts=2), "make no clusters of one size"),
        (folded_otherwise, dict(a=nn.Identity(), b=conv(3, 3), h=head(3)), "its trial trim raises"),
        (folded_otherwise, dict(a=conv(3, 9), b=conv(9, 9), h=nn.Sequential(nn.Flatten(1))), "cannot be cut together"),
    ],
    ids=["8 and 7", "of an input", "of an output"],
)
def test_parts_and_widths_that_leave_no_cut_pin(way, parts, why):
    spaces = csgd.find_spaces(Net(way, **parts), IMAGES)
    assert not any(space.trimmable for space in spaces)
    assert any(why in reason for space in spaces for reason in space.pinned)


def unfolded(net, x):
    y = F.unfold(net.a(x), 3, padding=1, stride=2)
    return net.h(F.fold(net.b(y).relu(), (8, 8), 3, padding=1, stride=2))


MADE = {
    "unfold and fold": (unfolded, dict(a=conv(3, 4), b=nn.Conv1d(36, 45, 1), h=head(5)), 9),
    "zeros_like": (lambda n, x: n.h(torch.zeros_like(y := n.a(x)) + y + n.b(y)), two, 16),
    "new_zeros": (lambda n, x: n.h((y := n.a(x)).new_zeros(y.shape) + n.b(y)), two, 16),
    "new_zeros, filled": (filled, two, 32),
    "ones of a width": (
        lambda n, x: n.h(torch.ones(1, (y := n.a(x)).size(1), 1, 1) * y),
        dict(a=conv(3, 16), h=head(16)),
        16,
    ),
    "ConvGRU": (
        lambda n, x: gru(n, x, torch.zeros(2, n.k, 8, 8)),
        dict(a=conv(3, 6), b=conv(14, 8), h=head(8), k=8),
        14,
    ),
    "ConvGRU, zeros_like": (
        lambda n, x: gru(n, x, torch.zeros_like(n.c(x))),
        dict(a=conv(3, 6), b=conv(14, 8), c=conv(3, 8), h=head(8)),
        14,
    ),
    "one gate for all": (
        lambda n, x: n.h((y := n.a(x)) * n.g(y).sigmoid().expand_as(y)),
        dict(a=conv(3, 16), g=conv(16, 1), h=head(16)),
        16,
    ),
    "one gate, by width": (
        lambda n, x: n.h((y := n.a(x)) * n.g(y).expand(-1, y.shape[1], -1, -1)),
        dict(a=conv(3, 16), g=conv(16, 1), h=head(16)),
        16,
    ),
    "one gate, repeated": (
        lambda n, x: n.h((y := n.a(x)) * n.g(y).repeat(1, y.shape[1], 1, 1)),
        dict(a=conv(3, 16), g=conv(16, 1), h=head(16)),
        16,
    ),
    "unpooling": (unpool, two, 16),
    "a blur": (
        lambda n, x: n.h(F.conv2d(n.a(x), n.f, groups=n.f.shape[0]).relu()),
        dict(a=conv(3, 16), f=torch.ones(16, 1, 3, 3) / 9, h=head(16)),
        16,
    ),
    "a blur that is repeated": (
        lambda n, x: n.h(F.conv2d(y := n.a(x), n.f.repeat(y.shape[1], 1, 1, 1), groups=y.shape[1]).relu()),
        dict(a=conv(3, 16), f=torch.rand(1, 1, 3, 3), h=head(16)),
        16,
    ),
    "dropout in eval mode too": (lambda n, x: n.h(n.b(F.dropout(n.a(x), 0.0)).relu()), two, 32),
    "one noise for all channels": (
        lambda n, x: n.h(n.b((y := n.a(x)) + y.new_empty(2, 1, 8, 8).normal_()).relu()),
        two,
        32,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_for_as_many_channels_is_cut_along(name):
    way, parts, free = MADE[name]
    check_exact(Net(way, **copy.deepcopy(parts)), IMAGES, free=free)


def test_a_recurrent_state_whose_width_a_module_holds_follows():
    net = ConvLSTM()
    _, _, narrow = check_exact(net, IMAGES, free=8)
    assert narrow.hidden == narrow.conv.out_channels // 4 < 8


def test_noise_of_each_channel_is_left_to_training_and_pinned_in_eval_mode():
    def noisy(net, x):
        y = net.a(x)
        return net.h(net.b(y + 0.1 * torch.randn_like(y) if net.training or net.always else y).relu())

    spaces = inner(Net(noisy, **copy.deepcopy(two), always=False), IMAGES)
    assert all(space.trimmable for space in spaces)
    first, second = inner(Net(noisy, **copy.deepcopy(two), always=True), IMAGES)
    assert first.pinned == ["randn_like: noise that is drawn for each channel in eval mode too"]
    assert second.trimmable


def test_a_buffer_whose_rows_are_equal_asks_for_nothing():
    way, parts, _ = MADE["a blur"]
    assert not inner(Net(way, **copy.deepcopy(parts)), IMAGES)[0].conditions
    unequal = dict(copy.deepcopy(parts), f=torch.rand(16, 1, 3, 3))
    assert inner(Net(way, **unequal), IMAGES)[0].conditions[0].kind is csgd.graph.Kind.ONLY_COLLAPSE


# embeddings


class Conv1D(nn.Module):
    """A linear layer as Hugging Face writes it."""

    def __init__(self, ins, outs):
        super().__init__()
        self.nf, self.weight, self.bias = outs, learned(ins, outs), learned(outs)

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


def classed(net, x):
    tokens = torch.cat([net.c.expand(x.size(0), -1, -1), net.a(x)], 1) + net.p[:, :5]
    return net.h(net.b(tokens).relu()[:, 0])


def interpolated(net, x):
    y = net.a(x)
    grid = net.p.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=y.shape[2:], mode="bilinear").flatten(2).transpose(1, 2)
    return net.h((y.flatten(2).transpose(1, 2) + grid).relu().mean(1))


EMBEDDED = {
    "positions": (
        lambda n, x: n.h((n.a(x) + n.p).relu().mean(1)),
        dict(a=nn.Linear(16, 8), p=learned(1, 4, 8), h=nn.Linear(8, 5)),
        WORDS,
        8,
    ),
    "class and positions": (
        classed,
        dict(a=nn.Linear(16, 8), b=nn.Linear(8, 8), c=learned(1, 1, 8), p=learned(1, 9, 8), h=nn.Linear(8, 5)),
        WORDS,
        16,
    ),
    "interpolated positions": (interpolated, dict(a=conv(3, 12), p=learned(1, 16, 12), h=nn.Linear(12, 5)), IMAGES, 12),
    "a learned map": (
        lambda n, x: n.h((n.a(x) + n.p).relu()),
        dict(a=conv(3, 16), p=learned(1, 16, 8, 8), h=head(16)),
        IMAGES,
        16,
    ),
    "a map as wide as high": (
        lambda n, x: n.h((n.a(x) * n.p).relu()),
        dict(a=conv(3, 8), p=learned(8, 8, 8), h=head(8)),
        IMAGES,
        8,
    ),
    "tokens": (
        lambda n, x: n.h((n.e(x) + n.p(torch.arange(4))).relu().mean(1)),
        dict(e=nn.Embedding(20, 8), p=nn.Embedding(4, 8), h=nn.Linear(8, 5)),
        TOKENS,
        8,
    ),
    "addmm": (
        lambda n, x: n.h(n.b(n.a(x).relu()).mean(1)),
        dict(a=Conv1D(16, 12), b=Conv1D(12, 8), h=nn.Linear(8, 5)),
        WORDS,
        20,
    ),
    "prompts": (
        lambda n, x: n.h(n.b(torch.cat([n.p.expand(2, -1, -1), n.a(x)], 1)).relu().mean(1)),
        dict(a=nn.Linear(16, 8), b=nn.Linear(8, 6), p=learned(1, 3, 8), h=nn.Linear(6, 5)),
        WORDS,
        14,
    ),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_follow_along_the_channels(name):
    way, parts, x, free = EMBEDDED[name]
    check_exact(Net(way, **copy.deepcopy(parts)), x, free=free)


def test_an_embedding_collapses_and_is_cut_with_its_stream():
    way, parts, x, _ = EMBEDDED["class and positions"]
    net = Net(way, **copy.deepcopy(parts))
    spaces = csgd.find_spaces(net, x)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 1 / 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    csgd.Collapse(optimizer, net, spaces, clusters, stop=5)
    for _ in range(5):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = net(x)
    csgd.trim(net, spaces, clusters, optimizer)
    assert net.p.shape == (1, 9, 4)
    torch.testing.assert_close(net(x), before)
    net(x).square().mean().backward()
    optimizer.step()
    wide = Net(way, **copy.deepcopy(parts))
    csgd.load_trimmed(wide, net.state_dict())
    assert torch.equal(wide(x), net(x))


def test_a_table_whose_weight_the_last_layer_shares_is_pinned_by_name():
    net = Net(lambda n, x: n.h(n.b(n.e(x)).relu()), e=nn.Embedding(20, 8), b=nn.Linear(8, 8), h=nn.Linear(8, 20))
    net.h.weight = net.e.weight
    assert any(
        "two roles: a weight of its own for each frees it" in reason for s in inner(net, TOKENS) for reason in s.pinned
    )


# outputs that count


def features(net, x):
    y = net.a(x)
    return {"logits": net.h(y), "features": y}


@pytest.mark.parametrize("outputs", [["logits"], lambda out: out["logits"]])
def test_what_is_returned_for_its_shape_may_change(outputs):
    net = Net(features, a=conv(3, 16), h=head(16))
    assert not any(space.trimmable for space in csgd.find_spaces(net, IMAGES))
    spaces = csgd.find_spaces(net, IMAGES, outputs=outputs)
    clusters = random_clusters(spaces)
    assert clusters.keys() == {"a"}
    assert csgd.prove(net, spaces, clusters, IMAGES, outputs=outputs).exact
    assert not csgd.prove(net, spaces, clusters, IMAGES).exact


@pytest.mark.parametrize(
    "outputs, line",
    [
        (["mask"], "outputs: the network does not return 'mask', but 'logits', 'features'"),
        ("logits", "outputs must be a list of names or numbers, or a function, got the text 'logits'"),
        (lambda out: None, "the model returns no tensor that can be found, but NoneType"),
    ],
)
def test_outputs_that_are_not_there_are_refused(outputs, line):
    with pytest.raises(csgd.InputError, match=line):
        csgd.find_spaces(Net(features, a=conv(3, 16), h=head(16)), IMAGES, outputs=outputs)


# decisions by order


def boxes(net, x):
    """The values at the best places, all of which are equally good but for rounding."""
    y, divisors = net.a(x).relu(), torch.arange(1, 65, dtype=x.dtype)
    scores = net.s(y).mean((2, 3)) * divisors / divisors
    best = scores.topk(5, 1).indices
    return net.h(y).flatten(2).gather(2, best[:, None].expand(-1, 4, -1))


def test_near_ties_of_a_choice_by_order_pin_nothing():
    spaces = inner(Net(boxes, a=conv(3, 16), s=conv(16, 1), h=conv(16, 4)), IMAGES)
    assert spaces[0].name == "a"
    assert spaces[0].trimmable


def test_a_choice_that_the_cut_turns_is_seen():
    def way(net, x):
        y = net.a(x)
        scores = net.s(y).flatten(1) - 0.1 * y.shape[1] * net.t(x).flatten(1)
        return net.h(y.mean((2, 3))) + scores.argmax(1, keepdim=True)

    net = Net(way, a=conv(3, 16), s=conv(16, 1), t=conv(3, 1), h=nn.Linear(16, 5))
    assert not inner(net, IMAGES)[0].trimmable


def suppressed(net, x):
    """The scores of boxes that overlap no better one; how wide the boxes are is a matter of the width."""
    y, scores = net.a(x), net.s(x).flatten()
    corners = net.b(y).flatten(2).transpose(1, 2).flatten(0, 1)
    sizes = 0.1 * y.shape[1] + net.t(x).flatten()[:, None].abs()
    kept = nms(torch.cat([corners, corners + sizes], 1), scores, 0.2)
    return net.h(y).mean((2, 3)) + scores[kept].sum()


def as_many(net, x):
    y = net.a(x)
    return net.h(y).mean((2, 3)) + net.s(x).flatten(1).topk(y.shape[1], 1).values.sum(1, keepdim=True)


@pytest.mark.parametrize("way, more", [(suppressed, dict(b=conv(16, 2), t=conv(3, 1))), (as_many, {})])
def test_a_choice_is_made_again_only_where_all_that_it_is_made_of_is_the_same(way, more):
    net = Net(way, a=conv(3, 16), s=conv(3, 1), h=conv(16, 4), **more)
    assert "its trial trim changes the output" in inner(net, IMAGES)[0].pinned


# rules


@torch.library.custom_op("csgd_tests::affine", mutates_args=())
def affine(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * scale.view(-1, 1, 1)


@affine.register_fake
def _(x, scale):
    return torch.empty_like(x)


affine.register_autograd(lambda ctx, grad: (grad, None))


def test_a_rule_of_ones_own_frees_an_operator():
    net = Net(lambda n, x: n.h(affine(n.a(x), n.g)), a=conv(3, 16), g=learned(16), h=head(16))
    assert "no rule for affine" in "; ".join(inner(net, IMAGES)[0].pinned)
    try:

        @csgd.rule("csgd_tests::affine")
        def follow(ledger, call):
            x, scale = call.inputs
            ledger.record(scale, 0, ledger.channels(ledger.labels(x), 1), "follow")
            ledger.label(call.outputs[0], ledger.labels(x))

        check_exact(net, IMAGES, free=16)
        RULES["csgd_tests::affine"] = lambda ledger, call: "may do anything"
        assert inner(net, IMAGES)[0].pinned[0] == "csgd_tests::affine: may do anything"
    finally:
        RULES.pop("csgd_tests::affine", None)


def test_a_rule_that_holds_for_another_function_too_is_tried_like_any():
    nets = [
        Net(lambda n, x, f=f: n.h(f(n.a(x))), a=conv(3, 16), h=head(16))
        for f in (torch.erfc, lambda x: x.logcumsumexp(1))
    ]
    assert [inner(net, IMAGES)[0].pinned for net in nets] == [["no rule for erfc"], ["no rule for logcumsumexp"]]
    try:
        csgd.rule("erfc", like="exp")
        csgd.rule("logcumsumexp", like="exp")  # which it is not
        check_exact(nets[0], IMAGES, free=16)
        assert "trial" in inner(nets[1], IMAGES)[0].pinned[0]
    finally:
        RULES.pop("erfc"), RULES.pop("logcumsumexp")
    with pytest.raises(csgd.InputError, match="like='nothing' has no rule"):
        csgd.rule("mine", like="nothing")


def padded(net, x):
    """Shortcuts that pad their channels with zeros, in front and behind."""
    x = net.a(x)
    return net.h(net.c(F.pad(x, net.pads).relu() + net.b(x).relu()))


def padded_by_its_width(net, x):
    x = net.a(x)
    return net.h(F.pad(x, (0, 0, 0, 0, 0, x.size(1))) + net.b(x))


def padded_on_one_side(net, x):
    x = net.a(x)
    return net.h(F.pad(x, (0, 0, 0, 0, 0, net.more)) + net.b(x))


def padded_by_the_rest(net, x):
    x = net.a(x)
    return net.h(F.pad(x, (0, 0, 0, 0, net.some, net.more - net.some)) + net.b(x))


PADDED = {
    "both sides, a tuple": (lambda: Net(padded, a=conv(3, 8), b=conv(8, 16), c=conv(16, 6), h=head(6),
                                        pads=(0, 0, 0, 0, 4, 4)), 22),
    "its own width": (lambda: Net(padded_by_its_width, a=conv(3, 8), b=conv(8, 16), h=head(16)), 8),
    "one side": (lambda: Net(padded_on_one_side, a=conv(3, 8), b=conv(8, 12), h=head(12), more=4), 12),
    "what is left of a number": (lambda: Net(padded_by_the_rest, a=conv(3, 8), b=conv(8, 18), h=head(18), some=4,
                                             more=10), 18),
}  # fmt: skip


@pytest.mark.parametrize("way", PADDED)
def test_channels_of_zeros_that_a_module_counts_follow(way):
    make, free = PADDED[way]
    net, x = make(), torch.randn(3, 3, 10, 10)
    check_exact(net, x, free=free)
    spaces = csgd.find_spaces(net, x)
    narrow, widths = copy.deepcopy(net), csgd.target_widths(spaces, 0.5)
    csgd.trim(narrow, spaces, csgd.cluster(narrow, spaces, widths), tolerance=None)
    loaded = csgd.load_trimmed(make(), narrow.state_dict(), example=x, widths=widths)
    assert torch.equal(loaded(x), narrow(x))
    if way == "both sides, a tuple":
        assert narrow.pads == loaded.pads == (0, 0, 0, 0, 2, 2)

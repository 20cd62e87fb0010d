"""Attention is cut exactly along the dims of queries, keys and values, and along whole heads (fact F14)."""

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import csgd
from csgd.verify import count_params

WIDTH, HEADS, DIMS = 24, 4, 6


class Net(nn.Module):
    """Tokens in a stream, one layer of attention, a head."""

    def __init__(self, attention: nn.Module, width: int = WIDTH):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(5, width), attention, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.attention(self.embed(x)).mean(1))


class Three(nn.Module):
    """Three layers; `meet` says how their products are written, `scale` what divides them."""

    def __init__(self, meet, values: int = 5, scale: float | None = None, width: int = WIDTH):
        super().__init__()
        self.heads, self.dims, self.meet, self.scale = HEADS, DIMS, meet, scale
        self.q, self.k = nn.Linear(width, HEADS * DIMS), nn.Linear(width, HEADS * DIMS)
        self.v, self.proj = nn.Linear(width, HEADS * values), nn.Linear(HEADS * values, width)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(self.meet(self, q, k, v).transpose(1, 2).flatten(2))


def matmul(net, q, k, v):
    scale = q.size(-1) ** -0.5 if net.scale is None else net.scale
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def einsum(net, q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q / q.shape[-1] ** 0.5, k)
    return torch.einsum("b h i j, b h j e -> b h i e", scores.softmax(-1), v)


def bmm(net, q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).unflatten(0, (-1, net.heads))


def fused(net, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=net.scale, dropout_p=0.5 if net.training else 0.0)


def eager(net, q, k, v):
    """As in Hugging Face's GPT-2."""
    scores = (q @ k.transpose(-1, -2) / v.size(-1) ** 0.5).float().softmax(-1)
    return scores.type(v.dtype) @ v


def causal(net, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class One(nn.Module):
    """One layer of queries, keys and values, as in timm: integers of its own say how it is read."""

    def __init__(self, norm: type[nn.Module] | None = None, typed: bool = False):
        super().__init__()
        self.num_heads, self.head_dim, self.typed = HEADS, DIMS, typed
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIMS), nn.Linear(HEADS * DIMS, WIDTH)
        self.q_norm, self.k_norm = (norm(DIMS) if norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c if self.typed else self.num_heads * self.head_dim))


class Reduced(nn.Module):
    """Keys and values of fewer tokens, as in PVT v2: all is read by the width of the stream, and `by` says how."""

    def __init__(self, heads: int, by: str = "dims"):
        super().__init__()
        self.num_heads, self.head_dim, self.by = heads, WIDTH // heads, by
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.reduce, self.norm = nn.Conv1d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)

    def forward(self, x):
        b, n, c = x.shape
        dims = self.head_dim if self.by == "dims" else c // self.num_heads
        q = self.q(x).reshape(b, n, self.num_heads, dims if self.by == "parts" else -1).transpose(1, 2)
        x = self.reduce(x.transpose(1, 2).reshape(b, c, n)).reshape(b, c, -1).transpose(1, 2)
        k, v = self.kv(self.norm(x)).reshape(b, -1, 2, self.num_heads, dims).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Measured(nn.Module):
    """What comes out of the heads is read by the width of the queries, as in Hugging Face's BERT."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head_dim = DIMS

    def forward(self, x):
        q = self.q(x)
        b, n, c = q.shape
        q, k, v = (t.view(b, n, -1, self.head_dim).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Grouped(nn.Module):
    """Twice as many queries as keys and values."""

    def __init__(self, repeated: bool):
        super().__init__()
        self.q, self.kv = (nn.Linear(WIDTH, 2 * HEADS * DIMS) for _ in range(2))
        self.proj, self.dims, self.repeated = nn.Linear(2 * HEADS * DIMS, WIDTH), DIMS, repeated

    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], -1, self.dims).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        k, v = (t.view(*x.shape[:2], -1, self.dims).transpose(1, 2) for t in (k, v))
        if self.repeated:
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.repeated)
        return self.proj(y.transpose(1, 2).flatten(2))


class Shared(nn.Module):
    """One key and one value for all heads."""

    def __init__(self, expanded: bool):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, HEADS * DIMS), nn.Linear(WIDTH, DIMS), nn.Linear(WIDTH, DIMS)
        self.proj, self.heads, self.expanded = nn.Linear(HEADS * DIMS, WIDTH), HEADS, expanded

    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        k, v = (layer(x).unsqueeze(1) for layer in (self.k, self.v))
        if self.expanded:
            k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        y = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """Windows of tokens, a table of one bias for each head and distance, and a scale that each head learns."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(WIDTH, 3 * HEADS * DIMS), nn.Linear(HEADS * DIMS, WIDTH), HEADS
        self.table, self.scale = nn.Parameter(torch.zeros(5, HEADS)), nn.Parameter(torch.ones(HEADS, 1, 1))
        self.register_buffer("distance", torch.arange(3)[:, None] - torch.arange(3) + 2)
        self.register_buffer("mask", torch.zeros(2, 3, 3).masked_fill(torch.eye(3) > 0, -1.0))

    def forward(self, x):
        b, n, _ = x.shape
        windows = x.view(b * n // 3, 3, -1)
        q, k, v = self.qkv(windows).view(b * n // 3, 3, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.scale
        bias = self.table[self.distance.view(-1)].view(3, 3, -1).permute(2, 0, 1)
        scores = scores + bias.unsqueeze(0)
        scores = scores.view(b, n // 3, self.heads, 3, 3) + self.mask.unsqueeze(1)[: n // 3]
        y = scores.view(-1, self.heads, 3, 3).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Crossed(nn.Module):
    """Attention between channels (XCA): only whole heads are the same before and after."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(WIDTH, 3 * HEADS * DIMS), nn.Linear(HEADS * DIMS, WIDTH), HEADS
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.proj((scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


class Pair(nn.Module):
    """Attention between channels whose two heads are as wide as the stream, in its code: one of them is left."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), 2

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class Overlapping(nn.Module):
    """Keys and values of windows that overlap and are padded, as in HAT; queries are padded too, as in DAT."""

    def __init__(self, by: str = "unfold"):
        super().__init__()
        self.qkv, self.proj, self.heads, self.by = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), HEADS, by

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, c).permute(2, 0, 1, 3)
        if self.by == "unfold":
            kv = F.unfold(torch.cat([k, v], 2).transpose(1, 2).reshape(b, 2 * c, 2, n // 2), 2, padding=1)
            k, v = kv.view(b, 2, c, -1).permute(1, 0, 3, 2)
        elif self.by == "windows":
            k, v = (t.unfold(1, 4, 2).permute(0, 1, 3, 2).flatten(1, 2) for t in (k, v))
        else:
            q, k, v = F.pad(torch.stack([q, k, v]), (0, 0, 0, 2), value=0 if self.by == "zeros" else 0.5)
        q, k, v = (t.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v)[:, :, :n].transpose(1, 2).reshape(b, n, c))


class Cosine(nn.Module):
    """Queries and keys of length one, a scale for each head, and a bias without keys, as in Swin v2."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(WIDTH, 3 * HEADS * DIMS), nn.Linear(HEADS * DIMS, WIDTH), HEADS
        self.scale = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x):
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        y = (scores * self.scale.clamp(max=4.6).exp()).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Joined(nn.Module):
    """A bias joined of two parameters and zeros."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIMS, bias=False), nn.Linear(HEADS * DIMS, WIDTH)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(HEADS * DIMS)) for _ in range(2))
        self.heads = HEADS

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.proj(y.transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """Pairs of dims are turned by angles, one for each pair."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIMS) for _ in range(3))
        self.proj, self.dims = nn.Linear(HEADS * DIMS, WIDTH), DIMS
        self.register_buffer("angle", torch.linspace(0.1, 1.0, DIMS // 2))

    def turned(self, x):
        angle = torch.cat([self.angle, self.angle]) * torch.arange(x.size(2), dtype=x.dtype)[:, None]
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.dims).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Torchs(nn.Module):
    """nn.MultiheadAttention; where it `crosses`, to tokens of another width."""

    def __init__(self, crosses: bool = False):
        super().__init__()
        other = dict(kdim=10, vdim=10) if crosses else {}
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **other)
        self.other = nn.Linear(WIDTH, 10) if crosses else nn.Identity()

    def forward(self, x):
        other = torch.tanh(self.other(x))
        y, weights = self.inner(x, other, other)
        return y * (1 + weights[..., :1])


NETS = {  # with the names of the spaces of attention that are free
    "matmul, scale implied": (lambda: Three(matmul), {"q", "q#heads", "v"}),
    "matmul, scale typed in": (lambda: Three(matmul, scale=0.3), {"q", "q#heads", "v"}),
    "einsum": (lambda: Three(einsum), {"q", "q#heads", "v"}),
    "bmm": (lambda: Three(bmm), {"q", "q#heads", "v"}),
    "fused, scale implied": (lambda: Three(fused), {"q", "q#heads", "v"}),
    "fused, scale typed in": (lambda: Three(fused, scale=0.3), {"q", "q#heads", "v"}),
    "eager": (lambda: Three(eager, values=DIMS), {"q", "q#heads"}),
    "causal": (lambda: Three(causal), {"q", "q#heads", "v"}),
    "one layer": (One, {"qkv", "qkv#heads"}),
    "as wide as the stream": (lambda: One(typed=True), {"qkv#heads"}),
    "one head as wide as the stream": (lambda: Reduced(1), {"q", "reduce"}),
    "two heads as wide as the stream": (lambda: Reduced(2), {"q", "reduce"}),
    "four heads as wide as the stream": (lambda: Reduced(4), {"q#heads", "reduce"}),
    "heads of parts of the stream": (lambda: Reduced(4, "parts"), {"q#heads", "reduce"}),
    "a head of all of the stream": (lambda: Reduced(1, "parts"), {"q", "reduce"}),
    "values of parts of the stream": (lambda: Reduced(2, "values"), {"q", "reduce"}),
    "as wide as its queries": (Measured, {"q", "q#heads"}),
    "norms of queries and keys": (lambda: One(nn.LayerNorm), {"qkv", "qkv#heads"}),
    "RMS norms of queries and keys": (lambda: One(nn.RMSNorm), {"qkv", "qkv#heads"}),
    "norms without a weight": (lambda: One(partial(nn.LayerNorm, elementwise_affine=False)), {"qkv#heads"}),
    "one norm of both": (lambda: One(cache(nn.LayerNorm)), {"qkv#heads"}),
    "groups": (lambda: Grouped(False), {"q", "q#heads"}),
    "groups repeated": (lambda: Grouped(True), {"q", "q#heads"}),
    "one key for all heads": (lambda: Shared(False), {"q", "q#heads", "v"}),
    "one key, expanded": (lambda: Shared(True), {"q", "q#heads", "v"}),
    "windows": (Windows, {"qkv", "qkv#heads"}),
    "channels": (Crossed, {"qkv#heads"}),
    "channels, of two heads": (Pair, {"qkv#heads"}),
    "windows that overlap": (Overlapping, {"qkv"}),
    "windows of tokens": (lambda: Overlapping("windows"), {"qkv"}),
    "padded with zeros": (lambda: Overlapping("zeros"), {"qkv"}),
    "vectors of length one": (Cosine, {"qkv", "qkv#heads"}),
    "a bias of parts": (Joined, {"qkv", "qkv#heads"}),
    "rotary": (Rotary, {"q#heads"}),
    "torch": (Torchs, {"inner#heads"}),
    "torch, three weights": (lambda: Torchs(crosses=True), {"inner#heads"}),
}
TOKENS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


def found(make) -> tuple[nn.Module, list[csgd.ChannelSpace]]:
    torch.manual_seed(0)
    net = Net(make())
    return net, csgd.find_spaces(net, TOKENS)


OTHERS = {"embed", "attention.proj", "attention.inner.out_proj", "attention.other"}


@pytest.mark.parametrize("name", NETS)
def test_every_form_of_attention_is_cut_exactly_to_half(name):
    make, free = NETS[name]
    net, spaces = found(make)
    assert {s.name for s in spaces if s.trimmable} - OTHERS == {f"attention.{one}" for one in free}
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    alone = [{s.name: clusters[s.name]} for s in spaces if s.trimmable and not s.conditions]
    for some in (clusters, *alone):  # a fault of one space must not hide behind another
        proof = csgd.prove(net, spaces, some, TOKENS)
        assert proof.exact
        assert None not in proof.changes.values()
        assert proof.change <= 1e-12
        assert proof.control >= 1e-3


@pytest.mark.parametrize("name, why", [("rotary", "rotary"), ("norms without a weight", "norm"), ("channels", "heads")])
def test_dims_that_stay_say_why(name, why):
    _, spaces = found(NETS[name][0])
    (dims,) = [s for s in spaces if s.pinned and s.name in ("attention.q", "attention.qkv")]
    assert any(why in reason and "whole heads may be free" in reason for reason in dims.pinned)


def test_keys_that_are_padded_with_other_numbers_than_zeros_stay():
    _, spaces = found(lambda: Overlapping("ones"))
    assert not any(space.trimmable for space in spaces if "qkv" in space.name)


def unit(x, **how):
    return F.normalize(x, dim=-1, **how)


def flat(x):
    return unit(x.transpose(1, 2).flatten(2)).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def scores(q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.parametrize(
    "meet, free",
    [
        (lambda net, q, k, v: scores(unit(q), k, v), {"v", "q#heads"}),
        (lambda net, q, k, v: scores(unit(q, eps=0.1), unit(k, eps=0.1), v), {"v"}),
        (lambda net, q, k, v: scores(unit(q, p=1.0), unit(k, p=1.0), v), {"v"}),
        (lambda net, q, k, v: scores(unit(q).tanh(), unit(k).tanh(), v), {"v", "q#heads"}),
        (lambda net, q, k, v: scores(unit(q)[..., :4], unit(k)[..., :4], v), {"v", "q#heads"}),
        (lambda net, q, k, v: scores(flat(q), flat(k), v), {"v"}),
        (lambda net, q, k, v: scores(q, k, unit(v)), {"q", "q#heads"}),
        (lambda net, q, k, v: scores(unit(q), unit(k), v) + scores(k, q, v), {"v", "q#heads"}),
    ],
    ids=["one side", "large eps", "other length", "bent", "picked", "over heads", "values", "read again"],
)
def test_vectors_of_length_one_stay_where_more_than_a_product_reads_them(meet, free):
    """The rules see it, and the trial after them finds no more."""
    net = Net(Three(meet))
    traced, tried = ([*csgd.find_spaces(net, TOKENS, trial=trial)] for trial in (False, True))
    for spaces in traced, tried:
        assert {s.name for s in spaces if s.trimmable} - OTHERS == {f"attention.{one}" for one in free}


def test_f14_keys_are_summed_and_need_not_be_equal():
    net, spaces = found(lambda: Three(fused, scale=0.3))
    net.eval()
    with torch.no_grad():
        net.attention.q.weight[1] = net.attention.q.weight[0]
        net.attention.q.bias[1] = net.attention.q.bias[0]
        for head in range(1, HEADS):  # alike in every head
            net.attention.q.weight[head * DIMS + 1] = net.attention.q.weight[head * DIMS]
            net.attention.q.bias[head * DIMS + 1] = net.attention.q.bias[head * DIMS]
    before, keys = net(TOKENS), net.attention.k.weight.clone()
    csgd.trim(net, spaces, {"attention.q": [[0, 1]]}, tolerance=1e-7)
    assert net.attention.q.weight.shape == (HEADS * (DIMS - 1), WIDTH)
    torch.testing.assert_close(net.attention.k.weight[0], keys[0] + keys[1])
    torch.testing.assert_close(net(TOKENS), before)


@pytest.mark.parametrize("name", ["fused, scale implied", "one layer", "torch", "norms of queries and keys"])
def test_f7_sgd_goes_on_with_the_narrow_attention_as_with_the_wide_one(name):
    net, spaces = found(NETS[name][0])
    net = net.double()
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    csgd.merge_equal(net, spaces, clusters)
    x, target = TOKENS.double(), torch.tensor([0, 2])
    runs = []
    for narrow in (False, True):
        model = copy.deepcopy(net)
        groups = csgd.param_groups(model, spaces, clusters, centri_strength=0.0, weight_decay=1e-3)
        optimizer = csgd.CSGD(groups, lr=0.05, momentum=0.9)
        for step in range(6):
            if step == 2 and narrow:  # momentum comes along
                csgd.trim(model, spaces, clusters, optimizer, tolerance=1e-9)
            optimizer.zero_grad()
            F.cross_entropy(model.eval()(x), target).backward()
            optimizer.step()
        runs.append(model(x))
    assert count_params(model) < 0.6 * count_params(net)
    assert float((runs[0] - runs[1]).detach().abs().max()) <= 1e-12


def test_integers_of_heads_and_dims_follow():
    net, spaces = found(One)
    sizes = {(ref.owners[0][1], space.name) for space in spaces for ref in space.refs if ref.role == "size"}
    assert sizes == {("num_heads", "attention.qkv#heads"), ("head_dim", "attention.qkv")}
    clusters = csgd.cluster(net, spaces, {"attention.qkv": 2, "attention.qkv#heads": 3})
    csgd.trim(net, spaces, clusters, tolerance=None)
    assert (net.attention.num_heads, net.attention.head_dim) == (3, 2)
    assert net.attention.qkv.weight.shape == (3 * 3 * 2, WIDTH)


def test_shapes_alone_do_not_tell_heads_from_dims():
    net, spaces = found(One)
    widths = {"attention.qkv": 3, "attention.qkv#heads": 2}
    csgd.trim(net, spaces, csgd.cluster(net, spaces, widths), tolerance=None)
    with pytest.raises(csgd.InputError, match="may be of fewer heads or of smaller ones"):
        csgd.load_trimmed(Net(One()), net.state_dict(), example=TOKENS)
    again = csgd.load_trimmed(Net(One()), net.state_dict(), example=TOKENS, widths=widths)
    assert (again.attention.num_heads, again.attention.head_dim) == (2, 3)
    assert torch.equal(again.eval()(TOKENS), net.eval()(TOKENS))


@pytest.mark.parametrize(
    "widths, line",
    [
        ({"attention.qkv": 7, "attention.qkv#heads": 2}, "widths 'attention.qkv#heads': 2 and 'attention.qkv': 7 do"),
        ({"attention.qkv": 4}, "may be of fewer heads or of smaller ones"),
        ({"attention.qkv": None, "attention.qkv#heads": 2}, "widths.attention.qkv must be a whole number of 1 or more"),
        ({"attention.qkv": -3, "attention.qkv#heads": -2}, "widths.attention.qkv must be a whole number of 1 or more"),
        ([3, 2], "widths must be a mapping {space name: width}, got list"),
    ],
)
@pytest.mark.parametrize("example", [TOKENS, None])
def test_widths_that_do_not_fit_the_heads_are_refused(widths, line, example):
    net, spaces = found(One)
    true = {"attention.qkv": 3, "attention.qkv#heads": 2}
    csgd.trim(net, spaces, csgd.cluster(net, spaces, true), tolerance=None)
    with pytest.raises(csgd.InputError) as caught:
        csgd.load_trimmed(Net(One()), net.state_dict(), example=example, widths=widths)
    assert line in str(caught.value)
    for name, width in true.items():  # one tells the other
        loaded = csgd.load_trimmed(Net(One()), net.state_dict(), example=example, widths={name: width})
        assert torch.equal(loaded.eval()(TOKENS), net.eval()(TOKENS))


class Beside(Three):
    """What comes out of the heads is read beside the stream."""

    def __init__(self):
        super().__init__(fused)
        self.proj = nn.Linear(HEADS * 5 + WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(torch.cat([self.meet(self, q, k, v).transpose(1, 2).flatten(2), x], -1))


def test_heads_that_are_read_beside_others_reload():
    net, spaces = found(Beside)
    widths = csgd.target_widths(spaces, 0.5)
    csgd.trim(net, spaces, csgd.cluster(net, spaces, widths), tolerance=None)
    again = csgd.load_trimmed(Net(Beside()), net.state_dict(), example=TOKENS, widths=widths)
    assert torch.equal(again.eval()(TOKENS), net.eval()(TOKENS))


@pytest.mark.parametrize("crosses", [False, True])
def test_torchs_attention_reloads_of_one_weight_and_of_three(crosses):
    net, spaces = found(lambda: Torchs(crosses))
    widths = csgd.target_widths(spaces, 0.5)
    csgd.trim(net, spaces, csgd.cluster(net, spaces, widths), tolerance=None)
    again = csgd.load_trimmed(Net(Torchs(crosses)), net.state_dict(), example=TOKENS, widths=widths)
    assert torch.equal(again.eval()(TOKENS), net.eval()(TOKENS))


def test_torchs_fast_path_takes_the_narrow_heads():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, WIDTH), nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True))
    net = nn.Sequential(net, nn.Linear(WIDTH, 3)).double().eval()
    spaces = csgd.find_spaces(net, TOKENS.double())
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    csgd.merge_equal(net, spaces, clusters)
    with torch.no_grad():
        before = net(TOKENS.double())
        csgd.trim(net, spaces, clusters)
        after = net(TOKENS.double())
    attention = net[0][1].self_attn
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (WIDTH // 2, HEADS // 2, DIMS)
    assert float((after - before).abs().max()) <= 1e-12


def test_collapse_then_cut_in_float32():
    net, spaces = found(One)
    clusters = csgd.cluster(net, spaces, csgd.target_widths(spaces, 0.5))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    collapse = csgd.Collapse(optimizer, net, spaces, clusters, stop=20)
    while not collapse.done:
        optimizer.zero_grad()
        F.cross_entropy(net(TOKENS), torch.tensor([0, 2])).backward()
        optimizer.step()
    before = net.eval()(TOKENS).detach()
    csgd.trim(net, spaces, clusters, optimizer)
    assert float((net(TOKENS).detach() - before).abs().max() / before.std()) <= 5e-6

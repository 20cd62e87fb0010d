"""Random small networks of ordinary code: a stem, some blocks, a head, hooks, frozen layers, all drawn from a seed.

Feature maps are 6 × 6.  A block is made of a random generator and the channels that it reads, and says in `channels`
how many it puts out.
"""

import random
import threading
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

import csgd

SIDE = 6
WIDTHS = [4, 6, 8, 12]
ACTIVATIONS = [F.relu, torch.tanh, F.gelu, F.hardswish, F.leaky_relu, torch.sigmoid]


def conv(rng: random.Random, inputs: int, outputs: int, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=rng.random() < 0.5, **options)


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels


# ordinary blocks


class Stack(Block):
    """conv → norm → activation."""

    def __init__(self, rng, c):
        super().__init__(rng.choice(WIDTHS))
        n = self.channels
        self.conv, self.function = conv(rng, c, n, rng.choice([1, 3])), rng.choice(ACTIVATIONS)
        self.norm = rng.choice(
            [
                nn.BatchNorm2d(n),
                nn.BatchNorm2d(n, momentum=None),
                nn.BatchNorm2d(n, track_running_stats=False),
                nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
                nn.GroupNorm(n, n),
                nn.Identity(),
            ]
        )

    def forward(self, x):
        return self.function(self.norm(self.conv(x)))


class Prelu(Block):
    def __init__(self, rng, c):
        super().__init__(c)
        self.act, self.scale = nn.PReLU(c), nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        return self.scale * self.act(x)


class Residual(Block):
    def __init__(self, rng, c):
        super().__init__(c)
        inner = rng.choice(WIDTHS)
        self.narrow, self.widen = conv(rng, c, inner, 1), conv(rng, inner, c)

    def forward(self, x):
        return x + self.widen(F.relu(self.narrow(x)))


class Concat(Block):
    def __init__(self, rng, c):
        super().__init__(c + 4)
        self.more, self.norm = conv(rng, c, 4), nn.BatchNorm2d(c + 4)

    def forward(self, x):
        return self.norm(torch.cat([x, F.relu(self.more(x))], 1))


class Depthwise(Block):
    def __init__(self, rng, c):
        factor = rng.choice([1, 1, 2])
        super().__init__(c * factor)
        self.conv = conv(rng, c, c * factor, groups=c)

    def forward(self, x):
        return self.conv(x)


class Grouped(Block):
    def __init__(self, rng, c):
        groups = rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        super().__init__(groups * rng.choice([2, 3, 4]))
        self.conv = conv(rng, c, self.channels, groups=groups)

    def forward(self, x):
        return self.conv(x)


class Gate(Block):
    """Squeeze and excitation."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.squeeze, self.excite = conv(rng, c, 4, 1), conv(rng, 4, c, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Halves(Block):
    """One half of the channels gates the other, or is convolved beside it."""

    def __init__(self, rng, c):
        half, gates = max(2, c // 2), rng.random() < 0.5
        super().__init__(half if gates else 2 * half)
        self.expand, self.conv = conv(rng, c, 2 * half, 1), None if gates else conv(rng, half, half)

    def forward(self, x):
        x = self.expand(x)
        if self.conv is None:
            return F.glu(x, 1)
        a, b = x.chunk(2, 1)
        return torch.cat([a, self.conv(b)], 1)


class Shuffle(Block):
    def __init__(self, rng, c):
        super().__init__(8)
        self.conv = nn.ConvTranspose2d(c, 8, 3, padding=1, groups=2 if c % 2 == 0 and rng.random() < 0.3 else 1)

    def forward(self, x):
        return F.channel_shuffle(self.conv(x), 2)


class Branches(Block):
    """Two kernel sizes, weighed by a softmax over the branches."""

    def __init__(self, rng, c):
        super().__init__(6)
        self.small, self.large = conv(rng, c, 6, 1), conv(rng, c, 6, 3)

    def forward(self, x):
        both = torch.stack([self.small(x), self.large(x)], 1)
        return (both * both.mean((3, 4), keepdim=True).softmax(1)).sum(1)


class Shared(Block):
    """One conv called twice, the channels last between the calls."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv = conv(rng, c, c)

    def forward(self, x):
        x = F.relu(self.conv(x)).permute(0, 2, 3, 1).contiguous()
        return self.conv(x.permute(0, 3, 1, 2))


class OwnNorm(Block):
    """Batch norm by hand: a running mean that forward writes itself."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv = conv(rng, c, c)
        self.register_buffer("running_mean", torch.zeros(c))

    def forward(self, x):
        x = self.conv(x)
        if self.training:
            mean = x.mean((0, 2, 3))
            self.running_mean.mul_(0.9).add_(0.1 * mean.detach())
        else:
            mean = self.running_mean
        return x - mean.view(1, -1, 1, 1)


def _by_hand(x):
    """Layer norm over dim 1, written out."""
    mean = x.mean(1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).square().mean(1, keepdim=True) + 1e-3)


def _response(x):
    """Global response norm."""
    size = x.norm(dim=(2, 3), keepdim=True)
    return x + x * size / (size.mean(1, keepdim=True) + 1e-3)


class ChannelsLast(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def _over_channels(rng, c):
    """A norm over c channels, or over groups of them, as a layer, as a function or by hand."""
    groups = rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
    return rng.choice(
        [
            nn.GroupNorm(groups, c, affine=rng.random() < 0.5),
            ChannelsLast(nn.LayerNorm(c, elementwise_affine=rng.random() < 0.5)),
            ChannelsLast(nn.RMSNorm(c)),
            nn.LayerNorm([c, SIDE, SIDE]),
            _by_hand,
            _response,
        ]
    )


class Weighed(Block):
    """A residual branch behind a norm over the channels, whose hidden channels may have one too."""

    def __init__(self, rng, c):
        super().__init__(c)
        hidden = rng.choice(WIDTHS)
        self.norm, self.hidden = _over_channels(rng, c), _over_channels(rng, hidden) if rng.random() < 0.5 else F.gelu
        self.up, self.down = conv(rng, c, hidden, 1), conv(rng, hidden, c, 1)

    def forward(self, x):
        return x + self.down(self.hidden(self.up(self.norm(x))))


class Skip(Block):
    """A norm over a concatenation, which ties its parts."""

    def __init__(self, rng, c):
        more = rng.choice(WIDTHS)
        super().__init__(c + more)
        self.more, self.norm = conv(rng, c, more), _over_channels(rng, c + more)

    def forward(self, x):
        return self.norm(torch.cat([x, self.more(torch.tanh(x))], 1))


class Computed(Block):
    """A weight that is computed from others: weight norm, spectral norm, a pruning mask in a pre-hook."""

    def __init__(self, rng, c):
        super().__init__(6)
        self.first, self.second = conv(rng, c, 6), conv(rng, 6, 6)
        rng.choice([parametrizations.weight_norm, parametrizations.spectral_norm, self.pruned])(self.first)

    @staticmethod
    def pruned(layer):
        prune.random_unstructured(layer, "weight", 0.5)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


# something else under self.training


class OtherFunction(Block):
    def __init__(self, rng, c):
        super().__init__(c)
        self.functions = rng.sample(ACTIVATIONS, 2)

    def forward(self, x):
        return self.functions[self.training](x)


class OtherBranch(Block):
    """A conv that only one of the modes calls, as at the end of a re-parametrised block."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.always, self.now_and_then, self.when = conv(rng, c, c), conv(rng, c, c, 1), rng.random() < 0.5

    def forward(self, x):
        y = self.always(x)
        return y + self.now_and_then(x).tanh() if self.training == self.when else y


class OtherTie(Block):
    """Two branches that meet in one of the modes alone."""

    def __init__(self, rng, c):
        super().__init__(12)
        self.left, self.right, self.when = conv(rng, c, 6), conv(rng, c, 6), rng.random() < 0.5

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        return torch.cat([left, left * right.sigmoid() if self.training == self.when else right], 1)


class TwoFlags(Block):
    """Two branches that meet only where its norm is in another mode, as in fine-tuning with norms in eval mode."""

    def __init__(self, rng, c):
        super().__init__(12)
        self.left, self.right, self.norm = conv(rng, c, 6), conv(rng, c, 6), nn.BatchNorm2d(6)

    def forward(self, x):
        left, right = self.norm(self.left(x)), self.right(x)
        return torch.cat([left, left * right.sigmoid() if self.training != self.norm.training else right], 1)


class StochasticDepth(Block):
    def __init__(self, rng, c):
        super().__init__(c)
        self.conv, self.draws = conv(rng, c, c), rng.choice(["torch", "numpy", "python"])

    def forward(self, x):
        y = F.relu(self.conv(x))
        if self.training:
            if self.draws == "torch":
                y = y * (torch.rand(len(y), 1, 1, 1, dtype=y.dtype) < 0.7)
            else:
                y = y * (0.5 + (np.random.rand() if self.draws == "numpy" else random.random()))
        return x + y


class Dropout(Block):
    def __init__(self, rng, c):
        super().__init__(c)
        self.conv, self.rate, self.layer = conv(rng, c, c), 0.3, nn.Dropout2d(0.3) if rng.random() < 0.5 else None

    def forward(self, x):
        x = self.conv(x)
        return self.layer(x) if self.layer is not None else F.dropout(x, self.rate, self.training)


# frozen


class NeverTrains(nn.BatchNorm2d):
    def train(self, mode: bool = True):
        return super().train(False)


class FrozenNorm(Block):
    """conv → norm whose statistics stand still."""

    def __init__(self, rng, c):
        super().__init__(6)
        kinds = [FrozenBatchNorm2d(6), NeverTrains(6), nn.BatchNorm2d(6, momentum=0.0)]
        self.conv, self.norm, self.after = conv(rng, c, 6), rng.choice(kinds), conv(rng, 6, 6, 1)

    def forward(self, x):
        return self.after(F.relu(self.norm(self.conv(x))))


class Constant(Block):
    """Scales its channels by a buffer of numbers that nothing trains."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv = conv(rng, c, c)
        self.register_buffer("scale", torch.rand(c, 1, 1) + 0.5, persistent=rng.random() < 0.5)

    def forward(self, x):
        return self.scale * self.conv(x)


class NoGrad(Block):
    """A frozen extractor that runs without gradients, beside a trained one."""

    def __init__(self, rng, c):
        super().__init__(6)
        self.frozen, self.trained = conv(rng, c, 6).requires_grad_(False), conv(rng, c, 6)

    def forward(self, x):
        with torch.no_grad():
            kept = self.frozen(x).relu()
        return kept + self.trained(x.detach())


# masks of minus infinity; `mask` [batch, 1, positions] is added to scores: 0 or -inf


class PositionAttention(Block):
    """Pools positions by a softmax over those that the mask leaves open."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.score, self.project = conv(rng, c, 1, 1), conv(rng, c, c, 1)

    def forward(self, x, mask):
        weight = (self.score(x).flatten(2) + mask).softmax(2)
        context = (x.flatten(2) * weight).sum(2)
        return x + self.project(context[:, :, None, None])


class SelfAttention(Block):
    """Attention over positions, causal by a mask that the code makes."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.query, self.key, self.value = conv(rng, c, 4, 1), conv(rng, c, 4, 1), conv(rng, c, 6, 1)
        self.out, self.causal = conv(rng, 6, c, 1), rng.random() < 0.5

    def forward(self, x, mask):
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        scores = query.transpose(1, 2) @ key / 2
        if self.causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(ahead, -inf)
        else:
            scores = scores + mask
        return x + self.out((value @ scores.softmax(-1).transpose(1, 2)).view(len(x), -1, SIDE, SIDE))


class PaddedMaximum(Block):
    """Max pooling with a border of minus infinity, and a soft maximum of what is positive."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv, self.soft = conv(rng, c, c, 1), rng.random() < 0.5

    def forward(self, x):
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-inf), 3, stride=1)
        if self.soft:
            x = x - F.softplus(torch.where(x > 0, x, -inf).logsumexp((2, 3), keepdim=True))
        return self.conv(x)


class LargestOpen(Block):
    """A gate of the largest value among positions that are open, of those among them that are positive."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv = conv(rng, c, c, 1)

    def forward(self, x, mask):
        largest = x.masked_fill(x <= 0, -inf).flatten(2).add(mask).amax(2)
        return x * torch.sigmoid(self.conv(largest.masked_fill(largest == -inf, 0.0)[:, :, None, None]))


MASKED = (PositionAttention, SelfAttention, LargestOpen)


# hooks that a network needs


class Tapped(Block):
    """Reads the activation that a hook keeps: a closure, a bound method or an object that is called."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.first, self.second, self.reader = conv(rng, c, 6), conv(rng, 6, c), conv(rng, 6, c, 1)
        self.kept = kept = {}
        hooks = [lambda m, args, out: kept.__setitem__("x", out), self.keep, Keeper(kept)]
        self.first.register_forward_hook(rng.choice(hooks))

    def keep(self, module, args, out):
        self.kept["x"] = out

    def forward(self, x):
        y = self.second(F.relu(self.first(x)))
        return y + self.reader(self.kept.pop("x"))


class Keeper:
    def __init__(self, kept: dict):
        self.kept = kept

    def __call__(self, module, args, out):
        self.kept["x"] = out


class Remembers(Block):
    """Adds what it computed in the last call, where that fits, or noise of a generator of its own."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv, self.last = conv(rng, c, c), None
        self.generator = torch.Generator().manual_seed(3) if rng.random() < 0.5 else None

    def forward(self, x):
        x, last = self.conv(x), self.last
        if self.generator is not None:
            return x + torch.rand(len(x), 1, 1, 1, generator=self.generator, dtype=x.dtype)
        self.last = x.detach()
        return x if last is None or last.shape != x.shape else x + 0.5 * last


# what must not be cut, or not below some width


class MixesChannels(Block):
    """Weighs duplicates, in one of the modes or in both."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv, self.modes = conv(rng, c, c), rng.choice([{True}, {False}, {True, False}])
        self.norm = rng.choice([nn.LayerNorm([c, SIDE, SIDE]), nn.GroupNorm(1, c), nn.Softmax(1), Centred()])

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) if self.training in self.modes else x


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Typed(Block):
    """A number of channels in the code: of a view, a factor, a condition."""

    def __init__(self, rng, c):
        super().__init__(c)
        self.conv, self.modes = conv(rng, c, c), rng.choice([{True}, {False}, {True, False}])
        self.code = rng.choice([self.viewed, self.divided, self.switched, self.written])

    def viewed(self, x):
        return x.view(-1, self.channels, SIDE * SIDE).softmax(2).view(-1, self.channels, SIDE, SIDE)

    def divided(self, x):
        return x * (4 / x.shape[1])

    def switched(self, x):
        return x.relu() if x.shape[1] > 3 else x

    def written(self, x):
        x = x.clone()
        x[:, 1] = 0.5
        return x

    def forward(self, x):
        x = self.conv(x)
        return self.code(x) if self.training in self.modes else x


SOUND = [
    Stack, Stack, Stack, Prelu, Residual, Concat, Depthwise, Grouped, Gate, Halves, Shuffle, Branches, Shared, OwnNorm,
    Computed, OtherFunction, OtherBranch, OtherTie, TwoFlags, StochasticDepth, Dropout, FrozenNorm, Constant, NoGrad,
    *MASKED, Weighed, Weighed, Skip, PaddedMaximum, Tapped, Remembers, MixesChannels,
]  # fmt: skip


# heads: what is made of the feature maps of all blocks


class Classes(nn.Module):
    """Logits, of classes that may be masked; in train mode perhaps those of an auxiliary head too."""

    def __init__(self, rng, widths):
        super().__init__()
        self.flat, self.masked = rng.random() < 0.3, rng.random() < 0.3
        self.fc = nn.Linear(widths[-1] * (SIDE * SIDE if self.flat else 1), 5)
        self.aux = nn.Linear(widths[0], 5) if rng.random() < 0.4 else None

    def forward(self, maps):
        out = self.fc(maps[-1].flatten(1) if self.flat else maps[-1].mean((2, 3)))
        if self.masked:
            out = out.masked_fill(torch.tensor([False, True, False, False, True]), -inf)
        return (out, self.aux(maps[0].mean((2, 3)))) if self.training and self.aux is not None else out


class Named(nn.Module):
    """A dict: logits, a map of classes, what is no tensor, and perhaps features as they are."""

    def __init__(self, rng, widths):
        super().__init__()
        self.fc, self.segment, self.features = nn.Linear(widths[-1], 5), conv(rng, widths[0], 3), rng.random() < 0.3

    def forward(self, maps):
        out = {"logits": self.fc(maps[-1].amax((2, 3))), "map": F.interpolate(self.segment(maps[0]), scale_factor=2.0)}
        out |= {"hidden": None, "task": "segment"}
        return out | {"features": [maps[len(maps) // 2]]} if self.features else out


class Pyramid(nn.Module):
    """A tuple of maps, each the sum of a lateral conv and of what is above it."""

    def __init__(self, rng, widths):
        super().__init__()
        self.lateral = nn.ModuleList(conv(rng, c, 6, 1) for c in widths)
        self.out = nn.ModuleList(conv(rng, 6, 4) for _ in widths)

    def forward(self, maps):
        sums = [self.lateral[-1](maps[-1])]
        for lateral, x in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            sums.insert(0, lateral(x) + sums[0])
        return tuple(layer(x) for layer, x in zip(self.out, sums, strict=True))


class RandomNet(nn.Module):
    """traps: also blocks that the rules alone cannot see through, such as sizes typed into the code."""

    def __init__(self, seed: int, traps: bool = True):
        super().__init__()
        rng = random.Random(seed)
        self.floor = rng.random() < 0.2  # of the input, whose logarithms may be -inf
        self.stem = conv(rng, 3, rng.choice(WIDTHS))
        widths, blocks = [self.stem.out_channels], []
        for kind in rng.choices([*SOUND, Typed] if traps else SOUND, k=rng.randint(2, 6)):
            blocks.append(kind(rng, widths[-1]))
            widths.append(blocks[-1].channels)
        self.blocks = nn.ModuleList(blocks)
        self.head = rng.choice([Classes, Classes, Named, Pyramid])(rng, widths[1:])
        self.seen = []  # by hooks
        self.wrapped = rng.choice(["tensors", "keywords", "dict"])
        self.lock = threading.Lock() if traps and rng.random() < 0.02 else None  # which cannot be copied
        self._decorate(rng)

    def _decorate(self, rng):
        """Hooks, frozen layers, gradients of an earlier step, and layers that are not in the mode of the network."""
        layers = [module for module in self.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
        for layer in rng.sample([*layers, *self.blocks], rng.choice([0, 0, 1, 3])):
            self._hook(rng, layer)
        for layer in rng.sample(layers, rng.choice([0, 0, 2])):
            layer.requires_grad_(False)
        for p in rng.sample(list(self.parameters()), rng.choice([0, 0, 2])):
            p.grad = torch.ones_like(p) if p.requires_grad else None
        self.train(rng.random() < 0.6)
        for module in rng.sample(list(self.modules()), rng.choice([0, 0, 2])):
            module.train(not module.training)

    def _hook(self, rng, layer):
        """A hook that changes what goes in or out, one that looks on, or one that is there once."""
        seen, factor, channels = self.seen, 0.5 + rng.random(), getattr(layer, "channels", None)
        beside = conv(rng, channels or 1, channels or 1, 1)

        def once(m, args):
            handle.remove()
            seen.append(args[0].shape)

        def look(m, args, out):
            m.last = out.detach()
            seen.append(float(m.last.sum()) if channels is None else m.last.shape)

        kind = rng.randrange(7)
        if kind == 0:
            layer.register_forward_hook(look)
        elif kind == 1:
            layer.register_forward_hook(lambda m, args, out: factor * out.tanh())
        elif kind == 2:
            layer.register_forward_pre_hook(lambda m, args: (factor * args[0], *args[1:]))
        elif kind == 3:
            layer.register_forward_hook(lambda m, args, kwargs, out: F.relu(out), with_kwargs=True)
        elif kind == 4:
            handle = layer.register_forward_pre_hook(once)
        elif kind == 5:
            layer.register_full_backward_hook(lambda m, gradients, out: seen.append("backward"))
        elif channels is not None:
            layer.beside = beside
            layer.register_forward_hook(lambda m, args, out: out + beside(out))

    def inputs(self, image: Tensor, mask: Tensor):
        """An example, or what the network is called with, in the form that this network wants."""
        if self.wrapped == "dict":
            return {"image": image, "mask": mask}
        return (image, mask) if self.wrapped == "tensors" else csgd.Inputs(image, mask=mask)

    def forward(self, image, mask=None):
        if isinstance(image, dict):
            image, mask = image["image"], image["mask"]
        x, maps = self.stem(image.clamp(min=-3.0) if self.floor else image), []
        for block in self.blocks:
            x = block(x, mask) if isinstance(block, MASKED) else block(x)
            maps.append(x)
        return self.head(maps)


def drawn(net: RandomNet, generator: torch.Generator, batch: int = 2, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """An image that holds -inf where the network takes it, and a mask that leaves at least one position open."""
    image = torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=dtype)
    if net.floor:
        image[image < -1] = -inf
    closed = torch.rand(batch, 1, SIDE * SIDE, generator=generator) < 0.4
    closed[..., 0] = False
    return image, torch.zeros(batch, 1, SIDE * SIDE, dtype=dtype).masked_fill(closed, -inf)


def example_of(net: RandomNet, seed: int):
    """An example as users give it: drawn, of one value alone, a view of something else, or with a gradient."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    image, mask = drawn(net, generator)
    value = rng.choice([None, None, None, 0.0, 1.0, 0.5, 255.0])
    if value is not None:
        image = torch.tensor(value).expand(image.shape) if rng.random() < 0.5 else torch.full_like(image, value)
    if rng.random() < 0.2:
        mask = torch.zeros_like(mask)
    if rng.random() < 0.2:
        image = image.transpose(2, 3)
    elif rng.random() < 0.2:
        image.requires_grad_()
    return net.inputs(image, mask)

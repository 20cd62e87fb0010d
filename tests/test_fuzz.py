"""Hundreds of random small networks: every space that is called trimmable is cut exactly, in eval and train mode."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import csgd
from csgd.trial import random_clusters


class RandomNet(nn.Module):
    """A random stack of blocks on 6×6 images, then one of two heads."""

    def __init__(self, seed: int):
        super().__init__()
        self.rng = random.Random(seed)
        self.layers, self.plan = nn.ModuleList(), []  # steps get the layers handed in, so that a copy calls its own
        channels = self.conv(3, self.rng.choice([4, 6, 8, 12]))
        for _ in range(self.rng.randint(1, 6)):
            block = self.rng.choice(
                ["conv", "norm", "act", "prelu", "residual", "concat", "depthwise", "grouped", "gate", "chunk", "glu",
                 "shuffle", "transposed", "branches", "swap", "shared", "multiplier", "slice"]
            )  # fmt: skip
            channels = getattr(self, block)(channels)
        self.flat = self.rng.random() < 0.5
        self.head = nn.Linear(channels * 36 if self.flat else channels, 3)

    def add(self, *modules):
        """Positions of the new layers."""
        first = len(self.layers)
        self.layers.extend(modules)
        return range(first, len(self.layers))

    def call(self, module):
        (i,) = self.add(module)
        self.plan.append(lambda x, layers: layers[i](x))

    def conv(self, inputs, outputs=None, **options):
        outputs = outputs or self.rng.choice([4, 6, 8, 12])
        options = dict(kernel_size=3, padding=1, bias=self.rng.random() < 0.5) | options
        self.call(nn.Conv2d(inputs, outputs, **options))
        return outputs

    def norm(self, c):
        kinds = [nn.BatchNorm2d(c), nn.InstanceNorm2d(c, affine=True, track_running_stats=True), nn.GroupNorm(c, c)]
        self.call(self.rng.choice(kinds))
        return c

    def act(self, c):
        function = self.rng.choice([F.relu, torch.tanh, F.gelu, F.hardswish, F.leaky_relu])
        self.plan.append(lambda x, _: function(x))
        return c

    def prelu(self, c):
        self.call(nn.PReLU(c))
        return c

    def residual(self, c):
        inner = self.rng.choice([4, 6])
        a, b = self.add(nn.Conv2d(c, inner, 1), nn.Conv2d(inner, c, 3, padding=1))
        self.plan.append(lambda x, layers: x + layers[b](F.relu(layers[a](x))))
        return c

    def concat(self, c):
        (i,) = self.add(nn.Conv2d(c, 4, 3, padding=1))
        self.plan.append(lambda x, layers: torch.cat([x, F.relu(layers[i](x))], 1))
        return c + 4

    def depthwise(self, c):
        self.call(nn.Conv2d(c, c, 3, padding=1, groups=c))
        return c

    def multiplier(self, c):
        self.call(nn.Conv2d(c, 2 * c, 3, padding=1, groups=c))
        return 2 * c

    def grouped(self, c):
        groups = self.rng.choice([g for g in (1, 2, 3, 4) if c % g == 0])
        outputs = groups * self.rng.choice([2, 3, 4])
        self.call(nn.Conv2d(c, outputs, 3, padding=1, groups=groups))
        return outputs

    def gate(self, c):
        a, b = self.add(nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1))
        self.plan.append(
            lambda x, layers: x * torch.sigmoid(layers[b](F.relu(layers[a](x.mean((2, 3), keepdim=True)))))
        )
        return c

    def chunk(self, c):
        if c % 2 or c < 4:
            return c
        (i,) = self.add(nn.Conv2d(c // 2, c // 2, 3, padding=1))

        def half(x, layers):
            a, b = x.chunk(2, 1)
            return torch.cat([a, layers[i](b)], 1)

        self.plan.append(half)
        return c

    def glu(self, c):
        if c % 2 or c < 4:
            return c
        self.plan.append(lambda x, _: F.glu(x, 1))
        return c // 2

    def shuffle(self, c):
        if c % 2:
            return c
        self.plan.append(lambda x, _: F.channel_shuffle(x, 2))
        return c

    def transposed(self, c):
        groups = 2 if c % 2 == 0 and self.rng.random() < 0.3 else 1
        self.call(nn.ConvTranspose2d(c, 8, 3, padding=1, groups=groups))
        return 8

    def branches(self, c):
        a, b = self.add(nn.Conv2d(c, 6, 1), nn.Conv2d(c, 6, 3, padding=1))

        def mixed(x, layers):
            stacked = torch.stack([layers[a](x), layers[b](x)], 1)
            return (stacked * stacked.mean((3, 4), keepdim=True).softmax(1)).sum(1)

        self.plan.append(mixed)
        return 6

    def swap(self, c):
        self.plan.append(lambda x, _: x.permute(0, 2, 3, 1).contiguous().transpose(1, 3).transpose(2, 3))
        return c

    def shared(self, c):
        (i,) = self.add(nn.Conv2d(c, c, 3, padding=1))
        self.plan.append(lambda x, layers: layers[i](F.relu(layers[i](x))))
        return c

    def slice(self, c):
        self.plan.append(lambda x, _: torch.cat([x[:, 1:], x[:, :1]], 1))
        return c

    def forward(self, x):
        for step in self.plan:
            x = step(x, self.layers)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


@pytest.mark.parametrize("chunk", range(8))
def test_random_networks_are_cut_exactly(chunk):
    torch.set_num_threads(1)
    cut = shown = 0
    for seed in range(50 * chunk, 50 * chunk + 50):
        model, example = RandomNet(seed), torch.randn(2, 3, 6, 6)
        spaces = csgd.find_spaces(model, example, trial=False)  # the rules alone, so that the trial hides nothing
        clusters = random_clusters(spaces, seed)
        if not any(len(parts) < space.size for space in spaces if (parts := clusters.get(space.name))):
            continue
        proof = csgd.prove(model, spaces, clusters, example, seed=seed)
        assert proof.change <= 1e-11, f"seed {seed}"
        shown += proof.control > 1e-6  # unequal members show …
        cut += 1
    assert cut >= 40
    assert shown >= cut - 2, "… but where the channels that were cut are dead"

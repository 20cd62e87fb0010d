"""ConvNeXt (Liu et al., 2022) in a size for small images: layer norm, GELU, layer scale, no batch norm."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of each position; images [n, c, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + scale · W₂ GELU(W₁ norm(depthwise(x))), with four times as many channels between W₁ and W₂."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = LayerNorm2d(width)
        self.widen = nn.Conv2d(width, 4 * width, 1)
        self.narrow = nn.Conv2d(4 * width, width, 1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.narrow(F.gelu(self.widen(self.norm(self.depthwise(x)))))


class ConvNeXt(nn.Module):
    """Patches of 2×2 pixels; stages of `blocks` blocks at `widths` channels, halved in between."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 2, 2), LayerNorm2d(widths[0]))
        stages = [nn.Sequential(*(Block(widths[0]) for _ in range(blocks[0])))]
        for before, width, count in zip(widths, widths[1:], blocks[1:], strict=False):
            halved = LayerNorm2d(before), nn.Conv2d(before, width, 2, 2)
            stages.append(nn.Sequential(*halved, *(Block(width) for _ in range(count))))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else 0.1)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x.mean((2, 3))))


def convnext(num_classes: int, widths: Sequence[int] = (24, 48, 96), blocks: Sequence[int] = (2, 2, 2)) -> ConvNeXt:
    return ConvNeXt(widths, blocks, num_classes)

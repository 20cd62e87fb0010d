"""DenseNet-40 (Huang et al., 2017): the CIFAR shape, without bottlenecks and without compression."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Puts `growth` channels of its own beside what it reads."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Transition(nn.Module):
    """Mixes all channels, and halves the image."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class CifarDenseNet(nn.Module):
    """Three blocks of `layers` layers each: 3 · layers + 4 layers."""

    def __init__(self, layers: int, growth: int, num_classes: int):
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for block in (1, 2, 3):
            inner = [DenseLayer(channels + growth * layer, growth) for layer in range(layers)]
            channels += growth * layers
            self.add_module(f"block{block}", nn.Sequential(*inner))
            if block < 3:
                self.add_module(f"transition{block}", Transition(channels))
        self.norm, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.conv1(images)))
        x = self.block3(self.transition2(self.block2(x)))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


def densenet40(num_classes: int) -> CifarDenseNet:
    return CifarDenseNet(12, 12, num_classes)

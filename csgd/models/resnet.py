"""Residual networks (He et al., 2016): the CIFAR shape with projection shortcuts, as published first and with norm and
activation before each conv, and ResNet-50."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class PreActBlock(nn.Module):
    """Norm and activation before each conv; with a bottleneck three convs, the last of which widens fourfold."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        widths = [inputs, *[width] * (len(sizes) - 1), outputs]
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, size, step, padding=size // 2, bias=False)
            for before, after, (size, step) in zip(widths, widths[1:], sizes, strict=False)
        )
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norms[0](x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.convs[0](out)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            out = conv(F.relu(norm(out)))
        return out + shortcut


class CifarPreResNet(nn.Module):
    """Three stages of `blocks` blocks at 16, 32 and 64 channels, fourfold behind bottlenecks."""

    def __init__(self, blocks: int, bottleneck: bool, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), 1):
            made = []
            for block in range(blocks):
                made.append(PreActBlock(inputs, width, 2 if stage > 1 and block == 0 else 1, bottleneck))
                inputs = made[-1].convs[-1].out_channels
            self.add_module(f"layer{stage}", nn.Sequential(*made))
        self.norm, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks at 16, 32 and 64 channels: 6 · blocks + 2 layers."""

    def __init__(self, blocks: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = BasicBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [BasicBlock(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20(num_classes: int) -> CifarResNet:
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int) -> CifarResNet:
    return CifarResNet(5, num_classes)


def resnet56(num_classes: int) -> CifarResNet:
    return CifarResNet(9, num_classes)


def resnet110(num_classes: int) -> CifarResNet:
    return CifarResNet(18, num_classes)


def preresnet20(num_classes: int) -> CifarPreResNet:
    return CifarPreResNet(3, False, num_classes)


def preresnet56(num_classes: int) -> CifarPreResNet:
    return CifarPreResNet(9, False, num_classes)


def preresnet110(num_classes: int) -> CifarPreResNet:
    return CifarPreResNet(18, False, num_classes)


def preresnet164(num_classes: int) -> CifarPreResNet:
    return CifarPreResNet(18, True, num_classes)


def resnet50(num_classes: int) -> nn.Module:
    return models.resnet50(num_classes=num_classes)

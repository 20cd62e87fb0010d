"""MobileNet-V1 (Howard et al., 2017): depthwise convs, each with a pointwise one behind it."""

import torch.nn.functional as F
from torch import Tensor, nn

PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
SMALL = 64  # images of fewer pixels are not halved by the first conv


def _conv(inputs: int, outputs: int, size: int, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class MobileNetV1(nn.Module):
    """A conv of 32 filters and 13 pairs of a depthwise and a pointwise one; `width` multiplies their channels."""

    def __init__(self, num_classes: int, image_size: int, width: float):
        super().__init__()
        inputs = round(32 * width)
        layers = _conv(3, inputs, 3, 1 if image_size < SMALL else 2)
        for channels, stride in PAIRS:
            outputs = round(channels * width)
            layers += _conv(inputs, inputs, 3, stride, groups=inputs) + _conv(inputs, outputs, 1, 1)
            inputs = outputs
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.features(images), 1).flatten(1))


def mobilenet_v1(num_classes: int, image_size: int, width: float = 1.0) -> MobileNetV1:
    return MobileNetV1(num_classes, image_size, width)

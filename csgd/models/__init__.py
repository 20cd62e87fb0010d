"""The networks of the papers, with torchvision's layer names where it has them, and every torchvision classifier."""

from csgd.models.convnext import convnext
from csgd.models.densenet import densenet40
from csgd.models.lenet import lenet5, lenet300
from csgd.models.mobilenet import mobilenet_v1
from csgd.models.resnet import (
    preresnet20,
    preresnet56,
    preresnet110,
    preresnet164,
    resnet20,
    resnet32,
    resnet50,
    resnet56,
    resnet110,
)
from csgd.models.torchvision import published_weights, torchvision
from csgd.models.vgg import vgg16, vgg16_bn, vgg19, vgg19_bn

__all__ = [
    "convnext",
    "densenet40",
    "lenet5",
    "lenet300",
    "mobilenet_v1",
    "preresnet20",
    "preresnet56",
    "preresnet110",
    "preresnet164",
    "published_weights",
    "resnet20",
    "resnet32",
    "resnet50",
    "resnet56",
    "resnet110",
    "torchvision",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]

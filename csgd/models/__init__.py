"""The networks of the paper, with the layer names of torchvision, and every torchvision classifier."""

from csgd.models.resnet import resnet20, resnet50, resnet56
from csgd.models.torchvision import published_weights, torchvision
from csgd.models.vgg import vgg16, vgg16_bn

__all__ = ["published_weights", "resnet20", "resnet50", "resnet56", "torchvision", "vgg16", "vgg16_bn"]

"""VGG-16 and VGG-19 (Simonyan and Zisserman, 2015): torchvision's layers and names, a head that fits the images."""

from torch import Tensor, nn
from torchvision.models import vgg


class VGG(nn.Module):
    """The 13 convs of VGG-16, or the 16 of VGG-19; features.0.weight, features.2.weight, …

    layers  D or E, as torchvision names them

    Images of 224 and more get torchvision's head (three linear layers on 7×7 positions), smaller ones a global mean
    and one linear layer.  `width` multiplies the channels of every conv.
    """

    def __init__(self, layers: str, batch_norm: bool, num_classes: int, image_size: int, width: float):
        super().__init__()
        layers = [c if c == "M" else round(c * width) for c in vgg.cfgs[layers]]
        self.features = vgg.make_layers(layers, batch_norm=batch_norm)
        last = layers[-2]
        if image_size >= 224:
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(last * 7 * 7, 4096),
                nn.ReLU(True),
                nn.Dropout(),
                nn.Linear(4096, 4096),
                nn.ReLU(True),
                nn.Dropout(),
                nn.Linear(4096, num_classes),
            )
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear) and image_size >= 224:
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def vgg16(num_classes: int, image_size: int, width: float = 1.0) -> VGG:
    return VGG("D", False, num_classes, image_size, width)


def vgg16_bn(num_classes: int, image_size: int, width: float = 1.0) -> VGG:
    return VGG("D", True, num_classes, image_size, width)


def vgg19(num_classes: int, image_size: int, width: float = 1.0) -> VGG:
    return VGG("E", False, num_classes, image_size, width)


def vgg19_bn(num_classes: int, image_size: int, width: float = 1.0) -> VGG:
    return VGG("E", True, num_classes, image_size, width)

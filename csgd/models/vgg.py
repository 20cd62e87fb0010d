"""VGG-16 (Simonyan and Zisserman, 2015): torchvision's layers and parameter names, a head that fits the images."""

from torch import Tensor, nn
from torchvision.models import vgg


class VGG(nn.Module):
    """The 13 convs of VGG-16; features.0.weight … features.28.weight.

    Images of 224 and more get torchvision's head (three linear layers on 7×7 positions), smaller ones a global mean
    and one linear layer.  `width` multiplies the channels of every conv.
    """

    def __init__(self, batch_norm: bool, num_classes: int, image_size: int, width: float):
        super().__init__()
        layers = [c if c == "M" else round(c * width) for c in vgg.cfgs["D"]]
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
    return VGG(False, num_classes, image_size, width)


def vgg16_bn(num_classes: int, image_size: int, width: float = 1.0) -> VGG:
    return VGG(True, num_classes, image_size, width)

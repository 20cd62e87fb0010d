"""Networks that people use, built without weights: (package, name) → the network and an example of its inputs."""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {  # images of 64×64 but for these, which type sizes in or shrink them by more than that
    **dict.fromkeys(("alexnet", "googlenet", "efficientvit_b1", "tf_efficientnetv2_b0"), 96),
    **dict.fromkeys(("vit_b_16", "maxvit_t", "efficientformer_l1", "visformer_tiny", "sequencer2d_s"), 224),
    "inception_v3": 299,
}
SEGMENTATION = ("deeplabv3", "fcn", "lraspp")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")


def networks() -> Iterator[tuple[str, str]]:
    """(package, name) of each network whose package is installed: those of networks.txt, and OTHERS."""
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    listed = [*(tuple(line.split()) for line in lines), *OTHERS]
    return ((package, name) for package, name in listed if find_spec(package.partition(".")[0]))


def build(package: str, name: str) -> tuple[nn.Module, Any]:
    """The network and an example of its inputs; whatever the package raises where it does not know the name."""
    torch.manual_seed(0)
    if (package, name) in OTHERS:
        return OTHERS[package, name]()
    if package == "torchvision" and name in VIDEO:
        return _torchvision(name), torch.randn(2, 3, 16, 64, 64)
    size = SIZES.get(name, 224 if "224" in name else 64)
    images = torch.randn(2, 3, size, size)
    if package == "torchvision":
        return _torchvision(name, **({"weights_backbone": None} if name.startswith(SEGMENTATION) else {})), images
    if package == "timm":
        return import_module("timm").create_model(name), images
    return getattr(import_module(package), name)("resnet18", encoder_weights=None), images


def _torchvision(name: str, **settings: Any) -> nn.Module:
    model = import_module("torchvision.models").get_model(name, weights=None, **settings)
    for module in model.modules():  # what is drawn at random cannot be compared
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model


class Maps(nn.Module):
    """A detector up to its maps, behind which the best boxes are chosen."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _detector(name: str) -> tuple[nn.Module, Tensor]:
    make = getattr(import_module("torchvision.models.detection"), name)
    return Maps(make(weights=None, weights_backbone=None)), torch.randn(2, 3, 128, 128)


def _unet2d() -> tuple[nn.Module, Any]:
    model = import_module("diffusers").UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    return model, (torch.randn(2, 3, 16, 16), torch.tensor([3, 7]))


def _autoencoder() -> tuple[nn.Module, Any]:
    model = import_module("diffusers").AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    return model, torch.randn(2, 3, 32, 32)


def _monai(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    return getattr(import_module("monai.networks.nets"), name)(**settings), torch.randn(2, 1, 64, 64)


def _crepe() -> tuple[nn.Module, Any]:
    return import_module("torchcrepe").Crepe("tiny"), torch.randn(2, 1024)


PLANE = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
OTHERS: dict[tuple[str, str], Callable[[], tuple[nn.Module, Any]]] = {
    ("torchvision.detection", "retinanet_resnet50_fpn"): lambda: _detector("retinanet_resnet50_fpn"),
    ("torchvision.detection", "fcos_resnet50_fpn"): lambda: _detector("fcos_resnet50_fpn"),
    ("diffusers", "UNet2DModel"): _unet2d,
    ("diffusers", "AutoencoderKL"): _autoencoder,
    ("monai", "SegResNet"): lambda: _monai("SegResNet", **PLANE, init_filters=32),
    ("monai", "UNet"): lambda: _monai("UNet", **PLANE, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2),
    ("monai", "BasicUNet"): lambda: _monai("BasicUNet", **PLANE),
    ("monai", "DynUNet"): lambda: _monai(
        "DynUNet", **PLANE, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2]
    ),
    ("monai", "AttentionUnet"): lambda: _monai("AttentionUnet", **PLANE, channels=(16, 32, 64), strides=(2, 2)),
    ("torchcrepe", "tiny"): _crepe,
}

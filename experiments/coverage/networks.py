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
    **dict.fromkeys(("levit_128s", "coat_lite_tiny"), 224),
    "PAN": 128,
    "inception_v3": 299,
}
SEGMENTATION = ("deeplabv3", "fcn", "lraspp")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "swin3d_t")


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
    if package == "ultralytics":
        return _yolo(name)
    if package == "timm":
        return import_module("timm").create_model(name), images
    return getattr(import_module(package), name)("resnet18", encoder_weights=None), images


def _torchvision(name: str, **settings: Any) -> nn.Module:
    model = import_module("torchvision.models").get_model(name, weights=None, **settings)
    for path, module in list(model.named_modules()):  # what is drawn at random cannot be compared
        if type(module).__name__ == "StochasticDepth":
            model.set_submodule(path, nn.Identity())
        elif isinstance(getattr(module, "p", None), float):
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


def _faster_rcnn() -> tuple[nn.Module, Any]:
    """Boxes and losses, not only maps."""
    make = import_module("torchvision.models.detection").fasterrcnn_mobilenet_v3_large_320_fpn
    boxes = torch.tensor([[10.0, 10.0, 80.0, 90.0], [30.0, 40.0, 150.0, 120.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([3, 7])} for _ in range(2)]
    return make(weights=None, weights_backbone=None), ([*torch.rand(2, 3, 160, 160)], targets)


def _raft() -> tuple[nn.Module, Any]:
    return _torchvision("raft_small"), (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128), 2)  # and two updates


class Predictions(nn.Module):
    """A YOLO without the features that it returns beside its maps, and without the choice of the best boxes."""

    def __init__(self, yolo: nn.Module):
        super().__init__()
        self.yolo = yolo

    def forward(self, x: Tensor) -> Any:
        out = self.yolo(x)
        return _without_features(out[1] if isinstance(out, tuple) else out)


def _without_features(out: Any) -> Any:
    return {key: _without_features(o) for key, o in out.items() if key != "feats"} if isinstance(out, dict) else out


def _yolo(name: str) -> tuple[nn.Module, Tensor]:
    task = {"seg": "Segmentation", "cls": "Classification"}.get(name.partition("-")[2], "Detection")
    model = getattr(import_module("ultralytics.nn.tasks"), f"{task}Model")(f"{name}.yaml", verbose=False)
    return Predictions(model), torch.randn(2, 3, 64, 64)


def _transformer(name: str, config: str, example: Tensor, **settings: Any) -> tuple[nn.Module, Tensor]:
    package = import_module("transformers")
    return getattr(package, name)(getattr(package, config)(**settings)), example


def _image_transformer(name: str, config: str, size: int = 64, **settings: Any) -> tuple[nn.Module, Tensor]:
    return _transformer(name, config, torch.randn(2, 3, size, size), **settings)


def _text_transformer(name: str, config: str, **settings: Any) -> tuple[nn.Module, Tensor]:
    return _transformer(name, config, torch.arange(18).view(2, 9), vocab_size=100, **settings)


def _diffuser(name: str, *inputs: Tensor, **settings: Any) -> tuple[nn.Module, Any]:
    return getattr(import_module("diffusers"), name)(**settings), inputs


def _monai(name: str, *size: int, **settings: Any) -> tuple[nn.Module, Tensor]:
    return getattr(import_module("monai.networks.nets"), name)(**settings), torch.randn(2, 1, *(size or (64, 64)))


def _restorer(name: str, channels: int = 3, size: int = 32, **settings: Any) -> tuple[nn.Module, Tensor]:
    """Super-resolution, denoising and the like."""
    module, _, of_it = name.rpartition(".")
    architecture = import_module(f"spandrel.architectures.{module or name}")
    return getattr(architecture, of_it)(**settings), torch.randn(2, channels, size, size)


def _audio(name: str, *inputs: Tensor, **settings: Any) -> tuple[nn.Module, Any]:
    return getattr(import_module("torchaudio.models"), name)(**settings), inputs


def _crepe() -> tuple[nn.Module, Any]:
    return import_module("torchcrepe").Crepe("tiny"), torch.randn(2, 1024)


STEPS = torch.tensor([3, 7])  # of the noise of two images
SMALL = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 4, "intermediate_size": 768}
PLANE = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
FOUR_BLOCKS = (64, 128, 256, 256)
OTHERS: dict[tuple[str, str], Callable[[], tuple[nn.Module, Any]]] = {
    ("torchvision.detection", "retinanet_resnet50_fpn"): lambda: _detector("retinanet_resnet50_fpn"),
    ("torchvision.detection", "fcos_resnet50_fpn"): lambda: _detector("fcos_resnet50_fpn"),
    ("torchvision.detection", "ssdlite320_mobilenet_v3_large"): lambda: _detector("ssdlite320_mobilenet_v3_large"),
    ("torchvision.detection", "fasterrcnn_mobilenet_v3_large_320_fpn"): _faster_rcnn,
    ("torchvision.optical_flow", "raft_small"): _raft,
    ("transformers", "ViT"): lambda: _image_transformer(
        "ViTForImageClassification", "ViTConfig", image_size=64, patch_size=8, **SMALL
    ),
    ("transformers", "DeiT"): lambda: _image_transformer(
        "DeiTForImageClassification", "DeiTConfig", image_size=64, patch_size=8, **SMALL
    ),
    ("transformers", "Dinov2"): lambda: _image_transformer(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        image_size=64,
        patch_size=8,
        **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    ),
    ("transformers", "Beit"): lambda: _image_transformer(
        "BeitForImageClassification",
        "BeitConfig",
        image_size=64,
        patch_size=8,
        use_relative_position_bias=True,
        **SMALL,
    ),
    ("transformers", "Swin"): lambda: _image_transformer(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=112,
        size=112,
        embed_dim=48,
        depths=(2, 2, 4),
        num_heads=(3, 6, 12),
        drop_path_rate=0.0,
    ),
    ("transformers", "ConvNext"): lambda: _image_transformer(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=(48, 96, 192, 384), depths=(2, 2, 4, 2)
    ),
    ("transformers", "Segformer"): lambda: _image_transformer(
        "SegformerForSemanticSegmentation", "SegformerConfig", drop_path_rate=0.0
    ),
    ("transformers", "PvtV2"): lambda: _image_transformer(
        "PvtV2ForImageClassification", "PvtV2Config", drop_path_rate=0.0
    ),
    ("transformers", "MobileViT"): lambda: _image_transformer("MobileViTForImageClassification", "MobileViTConfig"),
    ("transformers", "BERT"): lambda: _text_transformer("BertForSequenceClassification", "BertConfig", **SMALL),
    ("transformers", "DistilBERT"): lambda: _text_transformer(
        "DistilBertForSequenceClassification", "DistilBertConfig", dim=192, n_heads=3, n_layers=4, hidden_dim=768
    ),
    ("transformers", "GPT-2"): lambda: _text_transformer(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        n_embd=192,
        n_head=3,
        n_layer=4,
        pad_token_id=99,
        bos_token_id=98,
        eos_token_id=98,
    ),
    ("transformers", "Wav2Vec2"): lambda: _transformer(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        torch.randn(2, 4000),
        conv_dim=(128,) * 7,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **SMALL,
    ),
    ("transformers", "AST"): lambda: _transformer(
        "ASTForAudioClassification", "ASTConfig", torch.randn(2, 64, 64), max_length=64, num_mel_bins=64, **SMALL
    ),
    ("diffusers", "UNet2DModel"): lambda: _diffuser(
        "UNet2DModel",
        torch.randn(2, 3, 16, 16),
        STEPS,
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    ),
    ("diffusers", "UNet2DConditionModel"): lambda: _diffuser(
        "UNet2DConditionModel",
        torch.randn(2, 4, 16, 16),
        STEPS,
        torch.randn(2, 9, 96),
        block_out_channels=FOUR_BLOCKS,
        cross_attention_dim=96,
        norm_num_groups=8,
    ),
    ("diffusers", "UNet1DModel"): lambda: _diffuser(
        "UNet1DModel",
        torch.randn(2, 14, 32),
        STEPS,
        in_channels=14,
        out_channels=14,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        down_block_types=("DownResnetBlock1D",) * 3,
        mid_block_type="MidResTemporalBlock1D",
        up_block_types=("UpResnetBlock1D",) * 2,
        out_block_type="OutConv1DBlock",
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        downsample_each_block=False,
        act_fn="mish",
    ),
    ("diffusers", "AutoencoderKL"): lambda: _diffuser(
        "AutoencoderKL",
        torch.randn(2, 3, 32, 32),
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ),
    ("diffusers", "AutoencoderTiny"): lambda: _diffuser("AutoencoderTiny", torch.randn(2, 3, 32, 32)),
    ("diffusers", "VQModel"): lambda: _diffuser(
        "VQModel",
        torch.randn(2, 3, 32, 32),
        block_out_channels=(64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    ("diffusers", "DiTTransformer2DModel"): lambda: _diffuser(
        "DiTTransformer2DModel",
        torch.randn(2, 4, 16, 16),
        STEPS,
        torch.tensor([5, 9]),
        num_attention_heads=4,
        attention_head_dim=48,
        num_layers=4,
        sample_size=16,
    ),
    ("monai", "SegResNet"): lambda: _monai("SegResNet", **PLANE, init_filters=32),
    ("monai", "UNet"): lambda: _monai("UNet", **PLANE, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2),
    ("monai", "BasicUNet"): lambda: _monai("BasicUNet", **PLANE),
    ("monai", "DynUNet"): lambda: _monai(
        "DynUNet", **PLANE, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2]
    ),
    ("monai", "AttentionUnet"): lambda: _monai("AttentionUnet", **PLANE, channels=(16, 32, 64), strides=(2, 2)),
    ("monai", "VNet"): lambda: _monai("VNet", 32, 32, 32, out_channels=3),
    ("monai", "UNETR"): lambda: _monai(
        "UNETR",
        32,
        32,
        32,
        in_channels=1,
        out_channels=3,
        img_size=32,
        hidden_size=192,
        mlp_dim=768,
        num_heads=3,
    ),
    ("monai", "SwinUNETR"): lambda: _monai("SwinUNETR", **PLANE, feature_size=24),
    ("monai", "HighResNet"): lambda: _monai("HighResNet", **PLANE),
    ("spandrel", "ESRGAN"): lambda: _restorer("ESRGAN", num_blocks=4),
    ("spandrel", "Compact"): lambda: _restorer("Compact"),
    ("spandrel", "RCAN"): lambda: _restorer("RCAN", n_resgroups=3, n_resblocks=4),
    ("spandrel", "SPAN"): lambda: _restorer("SPAN", num_in_ch=3, num_out_ch=3),
    ("spandrel", "PLKSR"): lambda: _restorer("PLKSR", n_blocks=8),
    ("spandrel", "RealPLKSR"): lambda: _restorer("PLKSR.RealPLKSR", n_blocks=8),
    ("spandrel", "OmniSR"): lambda: _restorer("OmniSR", res_num=2),
    ("spandrel", "SwinIR"): lambda: _restorer(
        "SwinIR", size=16, window_size=8, depths=(2, 2), num_heads=(6, 6), img_size=16, upscale=2, drop_path_rate=0.0
    ),
    ("spandrel", "HAT"): lambda: _restorer(
        "HAT", size=16, window_size=8, depths=(2, 2), num_heads=(6, 6), img_size=16, upscale=2, drop_path_rate=0.0
    ),
    ("spandrel", "DAT"): lambda: _restorer(
        "DAT", size=16, img_size=16, embed_dim=60, split_size=[4, 8], depth=[2, 2], num_heads=[2, 2], drop_path_rate=0.0
    ),
    ("spandrel", "NAFNet"): lambda: _restorer(
        "NAFNet", width=32, middle_blk_num=2, enc_blk_nums=[1, 1, 2], dec_blk_nums=[1, 1, 1]
    ),
    ("spandrel", "SAFMN"): lambda: _restorer("SAFMN", size=64, dim=36),
    ("spandrel", "SCUNet"): lambda: _restorer("SCUNet", size=64, config=[2] * 7),
    ("spandrel", "MoSR"): lambda: _restorer("MoSR", n_block=6),
    ("spandrel", "DnCNN"): lambda: _restorer("DnCNN", channels=1),
    ("spandrel", "DRUNet"): lambda: _restorer("DRUNet", channels=1, nb=2),
    ("spandrel", "SwiftSRGAN"): lambda: _restorer("SwiftSRGAN"),
    ("torchaudio", "ConvTasNet"): lambda: _audio("ConvTasNet", torch.randn(2, 1, 2000), msk_num_layers=4),
    ("torchaudio", "Wav2Letter"): lambda: _audio(
        "Wav2Letter", torch.randn(2, 80, 100), input_type="mfcc", num_features=80
    ),
    ("torchaudio", "DeepSpeech"): lambda: _audio("DeepSpeech", torch.randn(2, 1, 50, 40), n_feature=40, n_hidden=512),
    ("torchaudio", "HDemucs"): lambda: _audio(
        "HDemucs", torch.randn(2, 2, 8192), sources=["voice", "rest"], channels=24, nfft=1024, depth=4
    ),
    ("torchaudio", "Conformer"): lambda: _audio(
        "Conformer",
        torch.randn(2, 50, 80),
        torch.tensor([50, 50]),
        input_dim=80,
        num_heads=4,
        ffn_dim=128,
        num_layers=3,
        depthwise_conv_kernel_size=31,
    ),
    ("torchaudio", "Emformer"): lambda: _audio(
        "Emformer",
        torch.randn(2, 36, 80),
        torch.tensor([32, 32]),
        input_dim=80,
        num_heads=4,
        ffn_dim=256,
        num_layers=3,
        segment_length=8,
        right_context_length=4,
    ),
    ("torchcrepe", "tiny"): _crepe,
}

"""How much of published networks a cut to half of the widths leaves out, exactly.

Their packages are for this test alone: diffusers, monai, segmentation-models-pytorch, timm, torchcrepe,
transformers (pip install).
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import csgd
from csgd.graph import Inputs
from csgd.graph.twin import run
from csgd.verify import count_params

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("default")]


@dataclass(frozen=True)
class Entry:
    """A network, an example, and the least share of its parameters or MACs that half of the widths leaves out."""

    package: str
    make: Callable[[Any], tuple[nn.Module, Any]]
    counted: str
    least: float


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def unet(diffusers):
    """The one of google/ddpm-cifar10-32."""
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return model, (images(16), torch.tensor([3, 7]))


def autoencoder(diffusers):
    """The one of Stable Diffusion."""
    model = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return model, images(32)


class Head(nn.Module):
    """A detector up to its maps: the boxes behind them come of a choice of the best, which jumps at near ties."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x):
        return self.head(list(self.backbone(x).values()))


def fcos(torchvision):
    detector = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
    return Head(detector), images(128)


def conditional_unet(diffusers):
    """That of Stable Diffusion, narrower."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(64, 128, 256, 256), cross_attention_dim=96, norm_num_groups=8
    )
    return model, (images(16, 4), torch.tensor([3, 7]), torch.randn(2, 9, 96))


def oobleck(diffusers):
    """The decoder of Stable Audio's autoencoder, narrower: weight norm by the older hook, on transposed convs too."""
    with torch.no_grad():  # a weight that has a gradient could not be copied
        model = diffusers.AutoencoderOobleck(
            encoder_hidden_size=16,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=32,
            decoder_input_channels=16,
        )
    return model.decoder, torch.randn(2, 16, 12)


def bert(transformers):
    config = transformers.BertConfig(
        hidden_size=192, num_attention_heads=6, num_hidden_layers=3, intermediate_size=768, vocab_size=100
    )
    return transformers.BertForSequenceClassification(config), torch.arange(18).view(2, 9)


def gpt2(transformers):
    """Without the cache: the keys and values in it are outputs."""
    config = transformers.GPT2Config(
        n_embd=96, n_layer=3, n_head=4, n_positions=32, vocab_size=100, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config), torch.arange(1, 19).view(2, 9)


def frozen_resnet50(torchvision):
    return torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d), images(64)


def faster_rcnn(torchvision):
    """Boxes and losses, not only maps: what is chosen by order is chosen again."""
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    boxes = torch.tensor([[10.0, 10.0, 80.0, 90.0], [30.0, 40.0, 150.0, 120.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([3, 7])} for _ in range(2)]
    return build(weights=None, weights_backbone=None), ([*images(160).sigmoid()], targets)


ZOO = {
    **{
        name: Entry("timm", lambda p, name=name: (p.create_model(name), images(64)), "MACs", 0.65)
        for name in (
            "mambaout_femto",
            "inception_next_atto",
            "fasternet_t0",
            "res2net50_14w_8s",
            "cspdarknet53",
            "dpn48b",
            "skresnet18",
            "ghostnet_100",
            "starnet_s1",
            "convmixer_768_32",
            "shvit_s1",
        )
    },
    "Faster R-CNN": Entry("torchvision", faster_rcnn, "MACs", 0.70),
    "ConvNeXt": Entry(
        "torchvision", lambda p: (p.models.convnext_tiny(stochastic_depth_prob=0.0), images(64)), "params", 0.60
    ),
    "ConvNeXt V2": Entry("timm", lambda p: (p.create_model("convnextv2_nano"), images(64)), "params", 0.60),
    "PoolFormer": Entry("timm", lambda p: (p.create_model("poolformer_s12"), images(64)), "params", 0.60),
    "MLP-mixer": Entry("timm", lambda p: (p.create_model("mixer_s32_224"), images(224)), "params", 0.40),
    "ViT": Entry("timm", lambda p: (p.create_model("vit_tiny_patch16_224", img_size=64), images(64)), "params", 0.60),
    "ViT with norms of queries and keys": Entry(
        "timm",
        lambda p: (p.create_model("vit_tiny_patch16_224", img_size=64, depth=4, qk_norm=True), images(64)),
        "params",
        0.60,
    ),
    "Swin": Entry(
        "timm",
        lambda p: (p.create_model("swin_tiny_patch4_window7_224", img_size=112), images(112)),
        "params",
        0.60,
    ),
    "Swin of torchvision": Entry("torchvision", lambda p: (p.models.swin_t(), images(64)), "params", 0.60),
    "Swin v2 of torchvision": Entry("torchvision", lambda p: (p.models.swin_v2_t(), images(64)), "params", 0.60),
    "ViT of torchvision": Entry(
        "torchvision", lambda p: (p.models.VisionTransformer(64, 16, 4, 4, 64, 256), images(64)), "params", 0.60
    ),
    "Swin v2 of timm, with tables that are not saved": Entry(
        "timm", lambda p: (p.create_model("swinv2_tiny_window8_256", img_size=128), images(128)), "params", 0.60
    ),
    "PVT v2": Entry("timm", lambda p: (p.create_model("pvt_v2_b0"), images(64)), "MACs", 0.70),
    "EdgeNeXt": Entry("timm", lambda p: (p.create_model("edgenext_x_small"), images(64)), "params", 0.40),
    "BERT": Entry("transformers", bert, "params", 0.60),
    "GPT-2": Entry("transformers", gpt2, "params", 0.60),
    "UNet2DConditionModel": Entry("diffusers", conditional_unet, "MACs", 0.70),
    "UNet2DModel": Entry("diffusers", unet, "MACs", 0.65),
    "AutoencoderKL": Entry("diffusers", autoencoder, "MACs", 0.65),
    "AutoencoderOobleck, of weight norm": Entry("diffusers", oobleck, "MACs", 0.70),
    "SegResNet": Entry(
        "monai.networks.nets",
        lambda p: (p.SegResNet(spatial_dims=2, init_filters=32, in_channels=3, out_channels=3), images(64)),
        "MACs",
        0.70,
    ),
    "HighResNet": Entry(
        "monai.networks.nets",
        lambda p: (p.HighResNet(spatial_dims=2, in_channels=3, out_channels=3), images(64)),
        "MACs",
        0.70,
    ),
    "FCOS": Entry("torchvision", fcos, "MACs", 0.70),
    "FPN": Entry(
        "segmentation_models_pytorch", lambda p: (p.FPN("resnet50", encoder_weights=None), images(64)), "MACs", 0.70
    ),
    "ResNet-50": Entry("torchvision", lambda p: (p.models.resnet50(), images(64)), "MACs", 0.74),
    "ResNet-50 with frozen batch norm": Entry("torchvision", frozen_resnet50, "MACs", 0.74),
    "CREPE, of batch norms of momentum 0": Entry(
        "torchcrepe", lambda p: (p.Crepe("tiny"), torch.randn(2, 1024)), "MACs", 0.60
    ),
}


def macs(model: nn.Module, example: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model.eval(), Inputs.of(example))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ZOO)
def test_published_networks_are_cut_exactly_to_half_of_their_widths(name):
    entry = ZOO[name]
    package = pytest.importorskip(entry.package)
    torch.manual_seed(0)
    model, example = entry.make(package)
    spaces = csgd.find_spaces(model, example)
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    proof = csgd.prove(model, spaces, clusters, example)
    narrow = copy.deepcopy(model)
    csgd.trim(narrow, spaces, clusters, tolerance=None)
    left = {
        "params": count_params(narrow) / count_params(model),
        "MACs": macs(narrow, example) / macs(model, example),
    }
    print(f"\n{name}: {1 - left['params']:.1%} of the parameters and {1 - left['MACs']:.1%} of the MACs go; {proof}")
    assert proof.exact
    assert None not in proof.changes.values()
    assert proof.change <= 1e-12
    assert proof.control >= 1e-3
    assert 1 - left[entry.counted] >= entry.least


def mask_rcnn(torchvision):
    """Images that it makes 800 pixels high itself."""
    boxes = torch.tensor([[10.0, 10.0, 80.0, 90.0], [30.0, 40.0, 150.0, 120.0]])
    target = {"boxes": boxes, "labels": torch.tensor([3, 7]), "masks": (images(160)[:, 0] > 0).to(torch.uint8)}
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return model, ([*images(160).sigmoid()], [dict(target) for _ in range(2)])


HEAVY = {  # 15 and 8 s on a quiet core
    "Mask R-CNN": ("torchvision", mask_rcnn),
    "VNet": ("monai.networks.nets", lambda p: (p.VNet(out_channels=3), torch.randn(2, 1, 32, 32, 32))),
}


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_networks_are_analysed_in_seconds(name):
    package, make = HEAVY[name]
    torch.manual_seed(0)
    model, example = make(pytest.importorskip(package))
    began = time.process_time()
    spaces = csgd.find_spaces(model, example)
    seconds = time.process_time() - began
    print(f"\n{name}: {seconds:.1f} CPU s")
    assert seconds < 20
    clusters = csgd.cluster(model, spaces, csgd.target_widths(spaces, 0.5), "even")
    proof = csgd.prove(model, spaces, clusters, example)
    assert proof.exact
    assert proof.change <= 1e-11
    assert proof.control >= 1e-3
    narrow = copy.deepcopy(model)
    csgd.trim(narrow, spaces, clusters, tolerance=None)
    assert count_params(narrow) < 0.3 * count_params(model)

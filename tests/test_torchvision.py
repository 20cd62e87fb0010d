"""Every classifier family of torchvision: cut at random in all spaces, float64, eval and train mode, and reloaded."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import csgd
from csgd.models import torchvision
from csgd.proof import Trial
from csgd.trial import random_clusters

FAMILIES = {  # name: image size; the first few run in CI, all of them with -m 'slow or not slow'
    "resnet18": 32,
    "mobilenet_v2": 64,
    "squeezenet1_1": 64,
    "shufflenet_v2_x0_5": 64,
    "mnasnet0_5": 64,
    "regnet_y_400mf": 64,
    "mobilenet_v3_small": 64,
    "alexnet": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "resnext50_32x4d": 64,
    "resnet50": 64,
    "wide_resnet50_2": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "vgg16_bn": 32,
    "convnext_tiny": 64,
    "efficientnet_v2_s": 64,
    "swin_t": 64,
    "vit_b_16": 224,
    "maxvit_t": 224,
}
FAST = 11
TYPED = {"swin_t", "maxvit_t"}  # sizes typed into their window attention, which the trial cut alone sees


def without_randomness(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off, so that train mode can be compared."""
    for module in model.modules():
        if hasattr(module, "p") and isinstance(module.p, float):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if i < FAST else [pytest.mark.slow]) for i, n in enumerate(FAMILIES)]
)
def test_family_is_cut_exactly_and_reloads(name):
    size = FAMILIES[name]
    model, example = without_randomness(torchvision(name, 10)), torch.randn(2, 3, size, size)
    spaces = csgd.find_spaces(model, example, trial=name in TYPED)
    clusters = random_clusters(spaces)
    proof = csgd.prove(model, spaces, clusters, example)
    assert proof.exact
    assert None not in proof.changes.values()
    assert proof.change <= 1e-12
    assert proof.control > 0.05, "unequal members must show"

    trial = Trial(model, spaces, clusters, example)
    trimmed = trial.cut(clusters)
    wide, widths = without_randomness(torchvision(name, 10)).double(), {key: len(of) for key, of in clusters.items()}
    for module, twin in zip(wide.modules(), trimmed.modules(), strict=True):
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eps = twin.eps  # a twin's are larger
    fresh = csgd.load_trimmed(wide, trimmed.state_dict(), widths=widths if name in TYPED else None)
    for a, b in zip(*(trial.passes(net, False).outputs for net in (trimmed, fresh)), strict=True):
        assert torch.equal(a, b)
    attributes = [[(m.extra_repr(), type(m)) for m in net.modules()] for net in (trimmed, fresh)]
    assert attributes[0] == attributes[1]


def test_coverage_of_residual_and_concat_networks():
    """Every conv of these networks but for the output layer can be trimmed."""
    for name, free in (("resnet50", 37), ("densenet121", 120), ("mobilenet_v2", 25)):
        spaces = csgd.find_spaces(torchvision(name, 10), torch.randn(2, 3, 32, 32), trial=False)
        assert sum(space.trimmable for space in spaces) == free
        assert [space.pinned for space in spaces if space.pinned] == [["network output"]]


class Detector(nn.Module):
    """Images of any size, resized as torchvision's detectors do it, and maps of them."""

    def __init__(self, **how):
        super().__init__()
        self.transform = GeneralizedRCNNTransform(800, 1333, [0.5] * 3, [0.2] * 3, **how)
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=4), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        batch = self.transform(images)[0].tensors
        return self.head(self.conv(batch).relu()).mean((2, 3))


@pytest.mark.parametrize("how", [{}, {"fixed_size": (96, 96)}])
def test_a_detector_that_resizes_images_is_tried_on_small_ones(monkeypatch, how):
    """Its channels are the same at any size; 800 × 1066 pixels in float64 take a minute."""
    seen, forward = [], GeneralizedRCNNTransform.forward

    def noted(self, images, targets=None):
        out = forward(self, images, targets)
        seen.append(tuple(out[0].tensors.shape[-2:]))
        return out

    monkeypatch.setattr(GeneralizedRCNNTransform, "forward", noted)
    model, images = Detector(**how), ([torch.rand(3, 60, 80), torch.rand(3, 60, 60)],)
    spaces = csgd.find_spaces(model, images)
    assert [space.name for space in spaces if space.trimmable] == ["conv"]
    assert csgd.prove(model, spaces, random_clusters(spaces), images).exact
    assert set(seen) == {(96, 96) if how else (256, 352)}
    assert model.transform.min_size == (800,)
    model(*images)
    assert seen[-1] == ((96, 96) if how else (800, 1088)), "the network itself keeps its size"


def test_a_size_that_a_detector_does_not_take_is_told_in_its_own_words():
    model = Detector()
    model.transform.min_size = 800
    with pytest.raises(csgd.InputError, match="cannot run on its example: transform: TypeError"):
        csgd.find_spaces(model, ([torch.rand(3, 60, 80)],))


class OfItsSize(Detector):
    """Sizes of its maps are typed in."""

    def __init__(self):
        super().__init__()
        self.transform = GeneralizedRCNNTransform(300, 300, [0.5] * 3, [0.2] * 3)

    def forward(self, images):
        maps = self.conv(self.transform(images)[0].tensors).relu()
        return self.head(maps.flatten(2)[..., :4900].unflatten(-1, (70, 70))).mean((2, 3))


def test_a_detector_whose_code_takes_one_size_alone_is_tried_at_that_size():
    model, images = OfItsSize(), ([torch.rand(3, 60, 60), torch.rand(3, 60, 60)],)
    spaces = csgd.find_spaces(model, images)
    assert [space.name for space in spaces if space.trimmable] == ["conv"]
    assert csgd.prove(model, spaces, random_clusters(spaces), images).exact

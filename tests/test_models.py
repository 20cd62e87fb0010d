import inspect

import pytest
import torch
import torchvision as tv
from test_config import composed

from csgd import InputError, find_spaces, models, target_widths
from csgd.clusters import cluster
from csgd.models import published_weights, resnet20, resnet50, resnet56, torchvision, vgg16, vgg16_bn
from csgd.proof import prove
from csgd.trim import cut
from csgd.verify import count_macs, count_params


@pytest.mark.parametrize(
    "build, size, macs, params",
    [
        (lambda: resnet56(10), 32, 125_747_840, 855_770),
        (lambda: resnet50(1000), 224, 4_089_184_256, 25_557_032),
        (lambda: models.resnet110(10), 32, 253_149_824, 1_730_714),
        (lambda: models.densenet40(10), 32, 282_917_328, 1_059_298),
        (lambda: models.preresnet164(10), 32, 247_646_720, 1_703_258),
        (lambda: models.mobilenet_v1(1000, 224), 224, 568_740_352, 4_231_976),
        (lambda: models.vgg19(10, 32), 32, 398_136_320, 20_029_514),
        (lambda: models.lenet300(10, 28), 28, 266_200, 266_610),
        (lambda: vgg16(10, 32), 32, 313_201_664, 14_719_818),
        (lambda: vgg16_bn(10, 32), 32, 313_201_664, 14_728_266),
    ],
)
def test_macs_and_params_of_the_literature(build, size, macs, params):
    model = build()
    assert count_macs(model, torch.randn(2, 3, size, size)) == macs
    assert count_params(model) == params


@pytest.mark.parametrize(
    "build, size, deps, published",
    [
        (lambda: resnet56(10), 32, "5_8", 0.6085),  # Ding et al. 2019
        (lambda: models.resnet110(10), 32, "5_8", 0.6089),
        (lambda: models.densenet40(10), 32, "densenet40", 0.6005),
        (lambda: models.densenet40(10), 32, "densenet40_3", 0.7779),  # of the released code
        (lambda: resnet50(1000), 224, "resnet50_70", 0.357),  # Ding et al. 2021
        (lambda: resnet50(1000), 224, "resnet50_60", 0.459),
        (lambda: resnet50(1000), 224, "resnet50_50", 0.554),
    ],
)
def test_recipes_cut_what_the_papers_say(build, size, deps, published):
    model, example, asked = build(), torch.randn(2, 3, size, size), composed(f"deps={deps}").deps
    before = count_macs(model, example)
    spaces = find_spaces(model, example, trial=False)
    widths = target_widths(spaces, asked.layers or asked.fraction, rest=asked.fraction)
    cut(model, spaces, cluster(model, spaces, widths, "even"))
    assert 1 - count_macs(model, example) / before == pytest.approx(published, abs=2e-3)


@pytest.mark.parametrize(
    "name", ["resnet110", "preresnet20", "preresnet164", "densenet40", "vgg19_bn", "lenet5", "mobilenet_v1"]
)
def test_networks_of_the_papers_are_cut_exactly(name):
    build = getattr(models, name)
    sized = {"image_size": 32} if "image_size" in inspect.signature(build).parameters else {}
    model, example = build(num_classes=10, **sized), torch.randn(2, 3, 32, 32)
    spaces = find_spaces(model, example, trial=False)
    assert [space.pinned for space in spaces if space.pinned] == [["network output"]]
    proof = prove(model, spaces, cluster(model, spaces, target_widths(spaces, 0.5), "even"), example)
    assert proof.exact
    assert proof.change <= 1e-12
    assert proof.control > 1e-3


@pytest.mark.parametrize("build, name", [(vgg16, "vgg16"), (vgg16_bn, "vgg16_bn")])
def test_vgg_has_torchvisions_names_and_shapes(build, name):
    theirs = tv.models.get_model(name, weights=None).state_dict()
    ours = build(1000, 224).state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)
    small = build(10, 32).state_dict()
    assert [key for key in small if key.startswith("features")] == [key for key in theirs if key.startswith("features")]
    assert small["classifier.0.weight"].shape == (10, 512)


def test_cifar_resnets_have_as_many_layers_as_they_say():
    for build, layers in ((resnet20, 20), (resnet56, 56)):
        convs = [m for n, m in build(10).named_modules() if isinstance(m, torch.nn.Conv2d) and "downsample" not in n]
        assert len(convs) + 1 == layers


def test_unknown_names_are_refused_with_names_like_them():
    with pytest.raises(InputError, match="'resnet19' is no torchvision classifier; names like it: .*resnet18"):
        torchvision("resnet19", 10)
    with pytest.raises(InputError, match=r"'V9' is neither a file nor weights of vgg16 \(published: IMAGENET1K_V1"):
        published_weights("vgg16", "V9")
    with pytest.raises(InputError, match="publishes no weights for the model 'resnet20'"):
        published_weights("resnet20", "IMAGENET1K_V1")

import pytest
import torch
import torchvision as tv

from csgd import InputError, find_spaces, target_widths
from csgd.clusters import cluster
from csgd.models import published_weights, resnet20, resnet50, resnet56, torchvision, vgg16, vgg16_bn
from csgd.trim import merge_equal, trim
from csgd.verify import count_macs, count_params


@pytest.mark.parametrize(
    "build, size, macs, params",
    [
        (lambda: resnet56(10), 32, 125_747_840, 855_770),
        (lambda: resnet50(1000), 224, 4_089_184_256, 25_557_032),
        (lambda: vgg16(10, 32), 32, 313_201_664, 14_719_818),
        (lambda: vgg16_bn(10, 32), 32, 313_201_664, 14_728_266),
    ],
)
def test_macs_and_params_of_the_literature(build, size, macs, params):
    model = build()
    assert count_macs(model, torch.randn(2, 3, size, size)) == macs
    assert count_params(model) == params


def test_resnet56_at_5_8_is_the_papers_60_85_percent():
    model, example = resnet56(10), torch.randn(2, 3, 32, 32)
    before = count_macs(model, example)
    spaces = find_spaces(model, example, trial=False)
    widths = target_widths(spaces, 5 / 8)
    clusters = cluster(model, spaces, widths, "even")
    merge_equal(model, spaces, clusters)
    trim(model, spaces, clusters)
    assert 1 - count_macs(model, example) / before == pytest.approx(0.6085, abs=5e-4)


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

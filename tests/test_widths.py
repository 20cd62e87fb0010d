import pytest
import torch

import csgd
from csgd import InputError, target_widths
from csgd.models import resnet20, vgg16
from tests import nets


@pytest.fixture(scope="module")
def residual():
    return csgd.find_spaces(nets.Residual(), nets.example_of(nets.Residual), trial=False)


@pytest.fixture(scope="module")
def vgg():
    return csgd.find_spaces(vgg16(10, 32), torch.randn(2, 3, 32, 32), trial=False)


def test_a_fraction_is_rounded_down(vgg):
    widths = target_widths(vgg, 5 / 8)
    assert list(widths.values()) == [40, 40, 80, 80, 160, 160, 160] + [320] * 6
    assert list(widths)[:3] == ["features.0", "features.2", "features.5"]
    assert target_widths(vgg, 0.6)["features.0"] == 38
    assert target_widths(vgg, 1.0)["features.0"] == 64


def test_the_papers_resnet_widths():
    spaces = csgd.find_spaces(resnet20(10), torch.randn(2, 3, 32, 32), trial=False)
    assert set(target_widths(spaces, 5 / 8).values()) == {10, 20, 40}


def test_a_list_has_one_width_per_layer(vgg):
    wanted = [40, 41, 80, 81, 160, 161, 162] + [320] * 6
    assert list(target_widths(vgg, wanted).values()) == wanted


def test_a_list_of_layers_that_share_a_space_must_agree(residual):
    # layers in the order of the forward pass: stem, inner, outer, squeeze, excite; stem, outer and excite are one space
    assert target_widths(residual, [6, 4, 6, 3, 6]) == {"stem": 6, "inner": 4, "squeeze": 3}
    assert target_widths(residual, [6, 4, 3]) == {"stem": 6, "inner": 4, "squeeze": 3}
    with pytest.raises(InputError, match="stem and outer share one channel space and must have one width, got 6 and 5"):
        target_widths(residual, [6, 4, 5, 3, 6])


def test_a_mapping_of_patterns(vgg, residual):
    widths = target_widths(vgg, {"features.*": 0.5, "features.0": 48})
    assert list(widths.values())[:3] == [48, 32, 64]
    assert target_widths(residual, {"inner": 0.5}) == {"stem": 8, "inner": 3, "squeeze": 4}
    assert target_widths(residual, {"outer": 0.5}, rest=0.75) == {"stem": 4, "inner": 4, "squeeze": 3}
    with pytest.raises(InputError, match="share one channel space must have one width, got stem: 4, outer: 6"):
        target_widths(residual, {"stem": 4, "outer": 6})


def test_min_width_round_to_and_keep(vgg, residual):
    assert target_widths(residual, 0.1) == {"stem": 2, "inner": 2, "squeeze": 2}
    assert target_widths(residual, 0.1, min_width=3) == {"stem": 3, "inner": 3, "squeeze": 3}
    assert set(target_widths(vgg, 0.55, round_to=16).values()) == {32, 64, 144, 288}
    assert target_widths(residual, 0.5, keep=["outer"]) == {"stem": 8, "inner": 3, "squeeze": 2}
    assert all(width % 8 == 0 for width in target_widths(vgg, 0.3, round_to=8).values())


@pytest.mark.parametrize(
    "size, fraction, options, width",
    [
        (34, 0.6, {}, 24),  # 20.4: 16 is 4.4 away, 24 is 3.6
        (40, 0.5, {}, 24),  # 20: of two as near the larger
        (40, 0.3, {}, 16),  # 12, likewise
        (40, 0.49, {}, 16),
        (64, 0.6, {}, 40),
        (30, 0.99, {}, 30),  # 32 is more than there is
        (30, 0.9, {}, 24),
        (6, 0.5, {}, 6),
        (64, 0.01, {}, 8),
        (64, 0.01, {"min_width": 12}, 16),
        (64, 1.0, {"min_width": 12}, 64),
        (20, 0.1, {"min_width": 17}, 20),
    ],
)
def test_a_fraction_becomes_the_nearest_multiple(size, fraction, options, width):
    net = torch.nn.Sequential(torch.nn.Linear(4, size), torch.nn.ReLU(), torch.nn.Linear(size, 3))
    spaces = csgd.find_spaces(net, torch.randn(2, 4), trial=False)
    assert target_widths(spaces, fraction, round_to=8, **options) == {"0": width}


@pytest.mark.parametrize(
    "deps, options, message",
    [
        (1.2, {}, "above 0 and at most 1, got 1.2"),
        (0.0, {}, "above 0 and at most 1, got 0"),
        (float("nan"), {}, "above 0 and at most 1, got nan"),
        ("5_8", {}, "must be a fraction, a list of widths or a mapping"),
        (True, {}, "must be a fraction, a list of widths or a mapping"),
        ([4, 4], {}, r"has 2 entries, the network has 5 trimmable layers \(in 3 channel spaces\)"),
        ([9, 4, 3], {}, "the width of stem must be between 2 .deps.min_width. and its 8 channels, got 9"),
        ([0, 4, 3], {}, "the width of stem must be between 2 .deps.min_width. and its 8 channels, got 0"),
        ([0.5, 4, 3], {}, "the width of stem must be a whole number, got 0.5"),
        ({"nothing.*": 0.5}, {}, "no layer matches 'nothing.*'"),
        ({"fc": 0.5}, {}, "'fc' cannot be trimmed .fc: network output."),
        ({"inner": 7}, {}, "'inner' must be between 2 .deps.min_width. and its 6 channels, got 7"),
        ({"inner": "half"}, {}, "deps.layers.inner must be a fraction or a width, got 'half'"),
        (0.5, {"keep": ["nothing"]}, "deps.keep: no layer matches 'nothing'"),
        (0.5, {"min_width": 0}, "deps.min_width must be a whole number of 1 or more"),
        (0.5, {"round_to": 0}, "deps.round_to must be a whole number of 1 or more"),
    ],
)
def test_bad_deps_say_what_is_wrong(residual, deps, options, message):
    with pytest.raises(InputError, match=message):
        target_widths(residual, deps, **options)


def test_a_network_in_which_nothing_can_be_trimmed():
    spaces = csgd.find_spaces(torch.nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(InputError, match="nothing in this network can be trimmed .*network output"):
        target_widths(spaces, 0.5)


def test_layers_that_are_no_conv_and_no_linear_are_called_so():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return torch.einsum("ni,io->no", x, self.weight)

    spaces = csgd.find_spaces(Own(), torch.randn(2, 4))
    with pytest.raises(InputError, match="calls no conv or linear function on a parameter of its own, as einsum and"):
        target_widths(spaces, 0.5)


def test_a_text_where_patterns_are_listed_is_refused(residual):
    with pytest.raises(InputError, match="deps.keep must be a list of patterns, got the text 'stem'"):
        target_widths(residual, 0.5, keep="stem")
    net, example = nets.Residual(), nets.example_of(nets.Residual)
    with pytest.raises(InputError, match="unused must be a list of patterns, got the text 'stem'"):
        csgd.find_spaces(net, example, unused="stem")
    with pytest.raises(InputError, match="examples must be a list of examples, got one tensor"):
        csgd.find_spaces(net, example, examples=example)

import json
import math
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from test_config import composed
from torch import Tensor, nn

from csgd import InputError
from csgd.pipeline import run
from csgd.train import accuracy, predict
from csgd.verify import Verdict, relative_change, verdict, worst


def judge(before, after, relative_deviation=1e-7, labels=None, statistics_spread=0.0):
    labels = torch.zeros(len(before), dtype=torch.long) if labels is None else labels
    return verdict(
        before,
        after,
        labels,
        deviation=1e-9,
        relative_deviation=relative_deviation,
        statistics_spread=statistics_spread,
        deviation_tolerance=1e-5,
        logit_tolerance=1e-4,
    )


def test_numbers_by_hand():
    before = torch.tensor([[4.0, 1.0], [1.0, -5.0]])
    after = before + torch.tensor([[0.0, 2e-4], [-1e-4, 0.0]])
    judged = judge(before, after, labels=torch.tensor([0, 1]))
    assert judged.max_logit_change == pytest.approx(2e-4, rel=1e-3)
    assert judged.relative_logit_change == pytest.approx(2e-4 / 3, rel=1e-3)
    assert relative_change(before, after).tolist() == pytest.approx([2e-4 / 3, 1e-4 / 6], rel=1e-3)
    assert judged.accuracy_before_trim == judged.accuracy_after_trim == judged.accuracy == 0.5
    assert judged.lossless


@pytest.mark.parametrize(
    "change, relative_deviation, lossless",
    [(0.0, 1e-7, True), (1e-2, 1e-7, False), (0.0, 1e-3, False), (math.nan, 1e-7, False), (0.0, math.nan, False)],
)
def test_a_wrong_result_is_never_lossless(change, relative_deviation, lossless):
    before = torch.tensor([[1.0, 2.0]])
    assert judge(before, before + change, relative_deviation).lossless is lossless


@pytest.mark.parametrize("spread", [1e-4, math.nan])
def test_statistics_come_under_the_tolerance_of_the_filters(spread):
    before = torch.tensor([[1.0, 2.0]])
    judged = judge(before, before, statistics_spread=spread)
    assert not judged.collapsed
    assert not judged.lossless


def test_one_loud_image_does_not_hide_the_others():
    before = torch.randn(100, 10)
    before[0] *= 1e5
    after = torch.cat([before[:1], torch.randn(99, 10)])
    judged = judge(before, after, labels=before.argmax(1))
    assert judged.accuracy_before_trim == 1
    assert judged.accuracy_after_trim < 0.5
    assert not judged.lossless
    assert judged.relative_logit_change > 0.1


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_large_offset_of_all_logits_hides_nothing(at_once):
    before = torch.randn(at_once, 10, dtype=torch.float64)
    after = before + 1e-3 * torch.randn(at_once, 10, dtype=torch.float64)
    torch.testing.assert_close(
        relative_change(before + 1e6, after + 1e6), relative_change(before, after), rtol=1e-5, atol=0
    )


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "before, after, change",
    [
        ([-INF, 0.0, 2.0], [-INF, 0.0, 2.0], 0.0),
        ([-INF, 0.0, 2.0], [-INF, 0.5, 2.0], 0.25),
        ([INF, 0.0, 2.0], [-INF, 0.0, 2.0], INF),
        ([-INF, 0.0, 2.0], [-1e30, 0.0, 2.0], INF),
        ([0.0, 0.0, 2.0], [0.0, INF, 2.0], INF),
        ([INF, -INF, INF], [INF, -INF, INF], 0.0),
        ([INF, -INF, INF], [INF, -INF, 0.0], INF),
        ([0.0, NAN, 2.0], [0.0, NAN, 2.0], INF),
        ([0.0, 1.0, 2.0], [0.0, NAN, 2.0], INF),
        ([4.0, 4.0, 4.0], [4.0, 4.0, 5.0], 0.25),
        ([-4.0, -INF, -INF], [-5.0, -INF, -INF], 0.25),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0.0),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 1e-30], INF),
        ([1e308, -1e308, 0.0], [1e308, -1e308, 1e308], 0.5),
    ],
)
def test_infinities_nan_and_images_without_spread(before, after, change):
    before, after = (torch.tensor([values, [0.0, 1.0, 2.0]], dtype=torch.float64) for values in (before, after))
    found = relative_change(before, after)
    assert found[1] == 0
    assert found[0] == (INF if change == INF else pytest.approx(change, rel=1.0 if change == 0.5 else 1e-9))
    assert judge(before, after).lossless is (change == 0.0)


@pytest.mark.parametrize("mask", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", [[4], [1, 4], [0, 1, 2]])
def test_a_finite_mask_does_not_hide_the_other_classes(mask, masked):
    """A11: a spread of 1e4 or more would let logits be drawn anew."""
    before, after = (torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for logits in (before, after):
        logits[:, masked] = mask
    assert not judge(before, after).lossless
    assert relative_change(before, after).min() > 0.1
    assert judge(before, before + 1e-6 * torch.ones(5).where(before > -100, 0)).lossless


def test_a_mask_that_is_added_and_logarithms_of_probabilities_keep_their_own_scale():
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    added = logits.double() - torch.tensor([0.0, 1e9, 0.0, 0.0, 1e9])
    assert judge(added, added + torch.tensor([1e-6, 64.0, 0.0, 0.0, 64.0])).lossless
    assert not judge(added, added + torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0])).lossless
    sure = (20 * logits).log_softmax(1)
    assert judge(sure, sure + 1e-6 * sure.abs().amax() * torch.randn(20, 5)).lossless


def test_a_class_that_leads_by_more_than_twice_the_change_stays():
    kept = moved = 0
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        before = torch.randn(64, 5, generator=draw).mul(2).round().div(2)  # ties are frequent
        before[torch.rand(before.shape, generator=draw) < 0.1] = -INF
        before[torch.rand(before.shape, generator=draw) < 0.02] = INF
        noise = torch.randn(before.shape, generator=draw) * 10 ** -(3 * torch.rand(64, 1, generator=draw))
        after = torch.where(torch.rand(64, 1, generator=draw) < 0.9, before + noise, torch.randn(64, 5, generator=draw))
        for one, other in zip(before, after, strict=True):
            change = judge(one[None], other[None]).max_logit_change if one.count_nonzero() else INF
            best, second = one.double().topk(2).values.tolist()
            if best - second > 2 * change:
                assert one.argmax() == other.argmax()
                kept += 1
            moved += int(one.argmax() != other.argmax())
    assert kept > 300
    assert moved > 300


@dataclass
class Answer:
    logits: Tensor
    boxes: list[Tensor]


@pytest.mark.parametrize(
    "nest",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, (None, [b])],
        lambda a, b: {"logits": a, "map": b},
        lambda a, b: UserDict(logits=a, more={"map": b}),
        lambda a, b: Answer(a, [b]),
    ],
    ids=["tuple", "nested", "dict", "UserDict", "dataclass"],
)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3), (6,), (2, 5), ()], ids=str)
def test_all_outputs_are_judged(nest, shape):
    logits, more, labels = torch.randn(6, 3), torch.randn(shape).add(3), torch.zeros(6, dtype=torch.long)
    assert judge(nest(logits, more), nest(logits, more.clone()), labels=labels).lossless
    changed = more.clone()
    changed.view(-1)[-1] += 1e-2
    judged = judge(nest(logits, more), nest(logits, changed), labels=labels)
    assert not judged.lossless
    assert judged.max_logit_change == pytest.approx(1e-2, rel=1e-3)
    assert judged.accuracy_before_trim == judged.accuracy_after_trim


def test_maps_are_judged_by_all_their_pixels():
    before, labels = torch.randn(4, 5, 3, 3), torch.zeros(4, dtype=torch.long)
    after = before.clone()
    after[2, 4, 1, 1] += 0.1
    judged = judge(before, after, labels=labels)
    assert judged.relative_logit_change == pytest.approx(float(0.1 / (before[2].max() - before[2].min())), rel=1e-4)
    assert math.isnan(judged.accuracy), "one label an image is none of its pixels"
    assert judge(before, after, labels=before.argmax(1)).accuracy_before_trim == 1


def test_integers_and_complex_numbers():
    logits, labels = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    indices = torch.tensor([2**60, 5, 6])
    assert judge((logits, indices), (logits, indices.clone()), labels=labels).lossless
    assert (
        judge((logits, indices), (logits, indices + torch.tensor([1, 0, 0])), labels=labels).relative_logit_change
        == INF
    )
    assert not judge((logits, logits > 0), (logits, logits > 9), labels=labels).lossless
    wave = torch.randn(3, 4, dtype=torch.complex64)
    assert judge((logits, wave), (logits, wave.clone()), labels=labels).lossless
    assert not judge((logits, wave), (logits, wave + 1j), labels=labels).lossless


@pytest.mark.parametrize(
    "after", [(torch.ones(3, 4),), (torch.ones(3, 4), torch.ones(3, 5)), (torch.ones(2, 4),) * 2, ()]
)
def test_other_shapes_are_another_function(after):
    judged = judge((torch.ones(3, 4),) * 2, after, labels=torch.zeros(3, dtype=torch.long))
    assert judged.relative_logit_change == judged.max_logit_change == INF
    assert not judged.lossless


@pytest.mark.parametrize(
    "outputs, images, line",
    [
        (torch.zeros(0, 10), 0, "there is nothing to judge: no image"),
        (torch.zeros(5, 10), 5, "there is nothing to judge: the network answers every image with zeros"),
        (([], None), 5, "there is nothing to judge: the network returns no tensor"),
        (torch.ones(5, 10), 4, "the verdict needs a label for each image: 4 for 5"),
    ],
)
def test_nothing_to_judge_is_refused(outputs, images, line):
    with pytest.raises(InputError, match=line):
        judge(outputs, outputs, labels=torch.zeros(images, dtype=torch.long))


def test_an_accuracy_of_nothing_is_refused():
    for logits, labels in (
        (torch.zeros(0, 3), torch.zeros(0)),
        (torch.zeros(4, 3), torch.zeros(1)),
        ((), torch.zeros(1)),
    ):
        with pytest.raises(InputError):
            accuracy(logits, labels)


def test_the_worst_of_several_verdicts_counts():
    numbers = dict.fromkeys(Verdict.__dataclass_fields__, 0.5)
    good = Verdict(**numbers | {"lossless": True, "collapsed": True})
    bad = Verdict(
        **numbers | {"lossless": False, "collapsed": True, "deviation": NAN, "max_logit_change": 7.0, "accuracy": 0.1}
    )
    for verdicts in ([good, bad], [bad, good]):
        judged = worst(verdicts)
        assert (judged.lossless, judged.collapsed, judged.max_logit_change) == (False, True, 7.0)
        assert math.isnan(judged.deviation)
        assert judged.accuracy == verdicts[-1].accuracy


class Several(nn.Module):
    """A map and a class beside the logits, and a temperature that no image has a part in."""

    def __init__(self):
        super().__init__()
        self.conv, self.temperature = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(()))

    def forward(self, images):
        maps = self.conv(images)
        logits = maps.mean((2, 3))
        return {"logits": logits, "more": (maps, logits.argmax(1)), "temperature": self.temperature}


def test_predict_returns_every_output_of_every_image():
    images, labels = torch.randn(7, 3, 5, 5), torch.arange(7) % 4
    net = Several()
    data = SimpleNamespace(test_batches=lambda: zip(images.split(3), labels.split(3), strict=True))
    (logits, maps, classes, temperature), found = predict(net, data)
    whole = net(images)
    torch.testing.assert_close(logits, whole["logits"])
    torch.testing.assert_close(maps, whole["more"][0])
    assert torch.equal(classes, logits.argmax(1))
    assert temperature.tolist() == [1.0] * 3, "one for each batch"
    assert torch.equal(found, labels)


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(InputError, match="the test set holds no image"):
        predict(Several(), SimpleNamespace(test_batches=lambda: iter([(torch.zeros(0, 3, 5, 5), torch.zeros(0))])))
    batches = [(torch.zeros(2, 3, size, size), torch.zeros(2)) for size in (5, 6)]
    with pytest.raises(InputError, match="other shapes from batch to batch"):
        predict(Several(), SimpleNamespace(test_batches=lambda: iter(batches)))


class Small(nn.Sequential):
    def __init__(self, num_classes, momentum=0.5):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2),
            nn.BatchNorm2d(8, momentum=momentum),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(num_classes),
        )
        self(torch.zeros(2, 3, 8, 8))


class Named(Small):
    def forward(self, images):
        logits = super().forward(images)
        return {"logits": logits, "scores": (logits.softmax(1),)}


SMALL = [
    "experiment=smoke", "model._target_=test_verify.Small", "dataset=synthetic", "dataset.image_size=8",
    "dataset.train_size=1040", "dataset.test_size=64", "deps=1_2",
    "centri_strength=15", "wandb=disabled", "report=false", "threads=1", "progress=false",
]  # fmt: skip


def summary_of(tmp_path, *more):
    run(composed(*SMALL, f"base.cache={tmp_path / 'base'}", *more), tmp_path)
    return json.loads((tmp_path / "summary.json").read_text())


def test_a_network_with_named_outputs_is_judged_by_all_of_them(tmp_path, monkeypatch):
    verdict = summary_of(tmp_path, "model._target_=test_verify.Named")["verdict"]
    assert verdict["lossless"]
    assert verdict["accuracy_before_trim"] == verdict["accuracy_after_trim"] > 0.5

    def other_scores(net, images):
        logits = Small.forward(net, images)
        is_cut = net[0].out_channels < 8 and len(images) > 2  # the trial, which would find this, shows two images
        return {"logits": logits, "scores": (logits.softmax(1) * (0.99 if is_cut else 1.0),)}

    monkeypatch.setattr(Named, "forward", other_scores)
    verdict = summary_of(tmp_path, "model._target_=test_verify.Named")["verdict"]
    assert verdict["collapsed"]
    assert not verdict["lossless"]
    assert verdict["relative_logit_change"] == pytest.approx(0.01, rel=0.2)


def test_an_average_that_lags_is_not_lossless(tmp_path, caplog):
    """Its own cut moves what ships, though that of the weights is exact."""
    summary = summary_of(tmp_path, "schedule.ema=0.98")
    verdict = summary["verdict"]
    assert not verdict["lossless"]
    assert not verdict["collapsed"]
    assert verdict["relative_deviation"] > 1e-3
    assert verdict["relative_logit_change"] > 1e-3
    assert summary["cut"]["foreseen_step"] is None, "said before the training"
    assert summary["cut"]["step"] == 130
    assert "which follow them with a momentum of 0.02, not before the end" in caplog.text


def test_the_cut_waits_for_the_average(tmp_path):
    summary = summary_of(tmp_path, "schedule.ema=0.8")
    assert summary["verdict"]["lossless"]
    assert 45 <= summary["cut"]["foreseen_step"] <= summary["cut"]["step"] < 100

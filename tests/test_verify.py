import math

import pytest
import torch

from csgd.verify import verdict


def judge(before, after, relative_deviation=1e-7, labels=None):
    labels = torch.zeros(len(before), dtype=torch.long) if labels is None else labels
    return verdict(
        before,
        after,
        labels,
        deviation=1e-9,
        relative_deviation=relative_deviation,
        statistics_spread=0.0,
        deviation_tolerance=1e-5,
        logit_tolerance=1e-4,
    )


def test_numbers_by_hand():
    before = torch.tensor([[4.0, 1.0], [1.0, -5.0]])
    after = before + torch.tensor([[0.0, 2e-4], [-1e-4, 0.0]])
    judged = judge(before, after, labels=torch.tensor([0, 1]))
    assert judged.max_logit_change == pytest.approx(2e-4, rel=1e-3)
    assert judged.relative_logit_change == pytest.approx(4e-5, rel=1e-3)
    assert judged.accuracy_before_trim == judged.accuracy_after_trim == judged.accuracy == 0.5
    assert judged.lossless


@pytest.mark.parametrize(
    "change, relative_deviation, lossless",
    [(0.0, 1e-7, True), (1e-2, 1e-7, False), (0.0, 1e-3, False), (math.nan, 1e-7, False), (0.0, math.nan, False)],
)
def test_a_wrong_result_is_never_lossless(change, relative_deviation, lossless):
    before = torch.tensor([[1.0, 2.0]])
    assert judge(before, before + change, relative_deviation).lossless is lossless

from itertools import pairwise

import pytest

from csgd.schedule import RAMPS, learning_rate, ramp


def rates(**options):
    options = dict(steps_per_epoch=10, epochs=4, lr=0.4) | options
    return [learning_rate(step, **options) for step in range(40)]


def test_warm_up_is_linear_and_ends_at_the_full_rate():
    assert rates(warmup_epochs=1, decay="constant")[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert set(rates(warmup_epochs=1, decay="constant")[10:]) == {0.4}


def test_cosine_falls_from_the_full_rate_towards_zero():
    values = rates(warmup_epochs=1)
    assert values[10] == pytest.approx(0.4)
    assert values[25] == pytest.approx(0.2)
    assert values[-1] < 0.002
    assert all(a > b for a, b in pairwise(values[10:]))


def test_steps_fall_at_the_milestones():
    values = rates(decay="step", milestones=[1, 2.5], gamma=0.1)
    assert values[:10] == [0.4] * 10
    assert values[10:25] == pytest.approx([0.04] * 15)
    assert values[25:] == pytest.approx([0.004] * 15)


def test_ramps_rise_to_one_and_stay():
    for shape in RAMPS:
        values = [ramp(step, length=10, shape=shape) for step in range(15)]
        assert values[9:] == [1.0] * 6
        assert all(a <= b for a, b in pairwise(values))
    assert ramp(4, length=10, shape="linear") == 0.5
    assert ramp(4, length=10, shape="quadratic") == 0.25
    assert ramp(4, length=10, shape="cosine") == pytest.approx(0.5)
    assert ramp(0, length=10) == 1.0

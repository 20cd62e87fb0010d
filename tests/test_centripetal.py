import math

import pytest
import torch

from csgd import decay_matrix, forecast, merge_matrix
from csgd.centripetal import (
    RowOrder,
    Segments,
    collapse_step,
    lengthening,
    merged_gradient,
    one_of_each,
    segment_mean,
    squared_deviation,
    stability_limit,
    strength_to_collapse,
)
from csgd.schedule import RAMPS, ramp
from tests.reference import random_partition, segments_of

CLUSTERS = [[0, 3], [1], [5, 2, 4]]


def test_merge_matrix_by_hand():
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for i, j in [(0, 0), (0, 3), (3, 0), (3, 3)]:
        expected[i, j] = 1 / 2
    expected[1, 1] = 1
    for i in (2, 4, 5):
        for j in (2, 4, 5):
            expected[i, j] = 1 / 3
    torch.testing.assert_close(merge_matrix(CLUSTERS), expected, rtol=0, atol=0)


def test_decay_matrix_by_hand():
    decay = decay_matrix(CLUSTERS, weight_decay=0.1, centri_strength=0.6)
    assert decay[0, 0].item() == pytest.approx(0.1 + 0.6 - 0.3)
    assert decay[0, 3].item() == pytest.approx(-0.3)
    assert decay[1, 1].item() == pytest.approx(0.1)
    assert decay[2, 4].item() == pytest.approx(-0.2)
    assert decay[0, 1].item() == 0


def test_f1_merge_matrix_is_a_projector():
    clusters = random_partition(40, 13, torch.Generator().manual_seed(3))
    merge, decay = merge_matrix(clusters), decay_matrix(clusters, 1e-2, 0.3)
    identity = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(merge, merge.T, rtol=0, atol=0)
    torch.testing.assert_close(merge @ merge, merge, rtol=0, atol=1e-14)
    assert torch.linalg.matrix_rank(merge) == 13
    torch.testing.assert_close(decay, 1e-2 * identity + 0.3 * (identity - merge), rtol=0, atol=0)
    torch.testing.assert_close(merge @ decay, 1e-2 * merge, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "shape, dim", [((12,), 0), ((12, 5), 0), ((12, 3, 2, 2), 0), ((4, 12, 3, 3), 1), ((2, 3, 12), 2)]
)
def test_the_merged_gradient_makes_the_dense_formula(shape, dim):
    generator = torch.Generator().manual_seed(1)
    clusters = random_partition(12, 7, generator)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    eta, eps = 0.02, 0.7
    order, segments = RowOrder.of(weight, dim), Segments.of(segments_of(clusters))
    merged = merged_gradient([order.rows(gradient)], [order.rows(weight)], segments, eps)
    fast = order.tensor(merged) + (eta + eps) * weight

    def flat(tensor):
        return tensor.movedim(dim, 0).reshape(12, -1)

    dense = merge_matrix(clusters) @ flat(gradient) + decay_matrix(clusters, eta, eps) @ flat(weight)
    torch.testing.assert_close(flat(fast), dense, rtol=0, atol=1e-14)
    mean = merge_matrix(clusters) @ flat(weight)
    torch.testing.assert_close(flat(segment_mean(weight, dim, segments_of(clusters))), mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(squared_deviation(order.rows(weight), segments), (flat(weight) - mean).square().sum())


def test_the_merged_gradient_leaves_its_arguments_alone():
    weight, gradient = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    copies = weight.clone(), gradient.clone()
    merged_gradient([gradient], [weight], Segments.of(segments_of(CLUSTERS)), 0.5)
    assert torch.equal(weight, copies[0])
    assert torch.equal(gradient, copies[1])


def test_segment_mean_of_singletons_is_the_tensor():
    tensor = torch.randn(5, 3)
    assert torch.equal(segment_mean(tensor, 0, torch.arange(5)), tensor)


def test_forecast_by_hand():
    # One heavy-ball step of b = pull, a = 1 − τ·pull; then b = μ·pull + pull·a, a ← a − τb.
    a1 = 1 - 0.1 * 0.5
    a2 = a1 - 0.1 * (0.9 * 0.5 + 0.5 * a1)
    assert forecast([0.1, 0.1], 0.4, 0.1, 0.9, nesterov=False) == pytest.approx([a1, a2])
    b1 = 0.5
    n1 = 1 - 0.1 * (0.5 + 0.9 * b1)
    assert forecast([0.1], 0.4, 0.1, 0.9, nesterov=True) == pytest.approx([n1])
    assert forecast([0.1, 0.1], 0.0) == [1.0, 1.0]


def test_forecast_shrinks_at_the_rate_of_f2():
    factors = forecast([0.01] * 400, 0.05, 0.0, 0.9, True)
    rate = math.log(factors[299] / factors[399]) / 100
    assert rate == pytest.approx(0.01 * 0.05 / (1 - 0.9), rel=0.05)


def test_f5_vectors_need_ten_times_as_many_steps():
    def steps(strength):
        return next(i for i, a in enumerate(forecast([1e-3] * 20000, strength)) if abs(a) < 1e-3)

    assert steps(0.05) / steps(0.5) == pytest.approx(10, rel=0.1)
    # The official CIFAR schedule: kernels e^-161, BN weights e^-15.6, at 50 000 / 64 steps an epoch.
    rates = [3e-2] * 200 * 782 + [3e-3] * 200 * 782 + [3e-4] * 200 * 782
    total = sum(rates) / (1 - 0.9)
    assert total * (3e-3 + 1e-4) == pytest.approx(161, rel=0.02)
    assert total * 3e-4 == pytest.approx(15.6, rel=0.02)
    assert math.log(abs(forecast(rates, 3e-4)[-1])) == pytest.approx(-15.6, rel=0.02)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_f6_the_stability_limit_is_where_the_recurrence_starts_to_grow(momentum, nesterov):
    limit = stability_limit(momentum, nesterov)
    inside = forecast([1.0] * 4000, 0.99 * limit, 0.0, momentum, nesterov)
    outside = forecast([1.0] * 4000, 1.01 * limit, 0.0, momentum, nesterov)
    assert abs(inside[-1]) < 1e-3
    assert abs(outside[-1]) > 1e3


def test_f4_the_smallest_strength_that_collapses():
    rates = [0.02 * min(1, (i + 1) / 50) for i in range(400)]
    strength = strength_to_collapse(rates, 1e-6, 1e-4)
    assert abs(forecast(rates, strength, 1e-4)[-1]) <= 1e-6
    assert abs(forecast(rates, 0.995 * strength, 1e-4)[-1]) > 1e-6
    assert strength_to_collapse([1e-3] * 3, 1e-6) is None
    assert strength_to_collapse([0.0] * 3, 1e-6) is None


@pytest.mark.parametrize("shape", RAMPS)
def test_f4_solves_for_any_ramp_and_step(shape):
    rates = [0.02 * 0.5 * (1 + math.cos(math.pi * i / 600)) for i in range(600)]
    ramps = [ramp(i, length=300, shape=shape) for i in range(600)]
    strength = strength_to_collapse(rates, 1e-5, 1e-4, ramp=ramps, within=300)
    for factor, reached in ((1.0, True), (0.98, False)):
        factors = forecast(rates, [factor * strength * r for r in ramps], 1e-4)
        assert (collapse_step(factors, 1e-5) <= 300) is reached
        assert all(abs(a) <= 1e-5 for a in factors[collapse_step(factors, 1e-5) :])
    lagging = strength_to_collapse(rates, 1e-5, 1e-4, ramp=ramps, within=300, statistics_momentum=0.1)
    assert lagging > strength, "statistics that lag need an earlier collapse"


def test_lengthening():
    assert lengthening(1e-2, 1e-6) == pytest.approx(3)
    assert lengthening(1e-8, 1e-6) == 1
    assert lengthening(1.0, 1e-6) == math.inf


def test_one_of_each_is_a_mean_in_the_precision_of_its_tensor():
    """Of a cluster of three: a third that was rounded to float32 would be off by 1e-8."""
    rows = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([0, 1, 0, 1, 0, 5])
    wanted = torch.stack([rows[[0, 2, 4]].mean(0), rows[[1, 3]].mean(0), rows[5]])
    torch.testing.assert_close(one_of_each(rows, 0, segments, mean=True), wanted, rtol=1e-14, atol=1e-15)
    sums = torch.stack([rows[[0, 2, 4]].sum(0), rows[[1, 3]].sum(0), rows[5]])
    torch.testing.assert_close(one_of_each(rows.T, 1, segments, mean=False), sums.T, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_means_in_every_precision_and_rows_that_are_alone_stay(dtype):
    """A third is not exact: rows of three that are equal must not grow with every merge."""
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    rows[[2, 4, 5]] = rows[5].clone()
    segments = Segments.of(segments_of(CLUSTERS), dtype=dtype)
    merged = segments.merge(rows)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(merged.double(), merge_matrix(CLUSTERS) @ rows.double(), rtol=2 * eps, atol=2 * eps)
    assert torch.equal(merged[1], rows[1])
    assert torch.equal(merged[2], merged[4])
    for _ in range(100):
        merged = segments.merge(merged)
    size = float(rows[2].double().norm())
    assert float(merged[2].double().norm()) == pytest.approx(size, rel=max(2 * eps, 1e-5))

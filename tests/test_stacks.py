"""Many tensors, few operations: what is merged is what the dense matrix says, whatever their shapes and layouts."""

import pytest
import torch

from csgd.centripetal import merge_matrix
from csgd.stacks import KEPT, STACKED, Latest, stacks_of
from tests.reference import random_partition, segments_of


def tensors():
    """Kernels of one and of several shapes, turned, transposed and with gaps, vectors, and one that is large."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 2, 2)] * 3 + [
        (6, 3, 2, 2),
        (6, 4, 2, 2),
        (8, 12),
        (9, 12),
        (7,),
        (12,),
        (5, 8, 2, 2),
        (40, STACKED // 32),
    ]
    made = [(torch.randn(shape, generator=draw, dtype=torch.float64), 0) for shape in shapes]
    made += [(torch.randn(4, 8, 2, 2, generator=draw, dtype=torch.float64), 1) for _ in range(2)]
    made[1] = made[1][0].to(memory_format=torch.channels_last), 0
    made.append((torch.randn(8, 20, generator=draw, dtype=torch.float64)[:, :12], 0))
    made.insert(0, (torch.randn(9, generator=draw), 0))
    return [(t, dim, random_partition(t.size(dim), t.size(dim) // 2, draw)) for t, dim in made]


def dense(tensor, dim, clusters, left):
    rows = tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
    mean = merge_matrix(clusters, dtype=tensor.dtype) @ rows
    return (mean + left * (rows - mean)).view_as(tensor.movedim(dim, 0)).movedim(0, dim)


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("memory", [None, {}], ids=["fresh", "shared"])
def test_merged_in_place_they_are_the_dense_formula_and_rows_that_are_alone_stay(left, memory):
    made = tensors()
    expected = [dense(*one, left) for one in made]
    before = [tensor.clone() for tensor, *_ in made]
    stacks = stacks_of([(tensor, dim, segments_of(clusters)) for tensor, dim, clusters in made], memory)
    assert len(stacks) < len(made) - 4, "some of them share their operations"
    for stack in stacks:
        stack.merge_(stack.tensors, left)
    for (tensor, dim, clusters), old, wanted in zip(made, before, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-6 if tensor.dtype == torch.float32 else 1e-12, atol=1e-12)
        for members in clusters:
            first = tensor.select(dim, members[0])
            if len(members) == 1:
                assert torch.equal(first, old.select(dim, members[0]))
            elif left == 0:
                assert all(torch.equal(first, tensor.select(dim, slot)) for slot in members)


def test_values_may_lie_otherwise_than_the_tensors_that_stacks_were_made_for():
    made = [one for one in tensors() if one[0].dim() == 4]
    stacks = stacks_of([(tensor, dim, segments_of(clusters)) for tensor, dim, clusters in made], {})
    values = {id(t): torch.randn(t.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0) for t, *_ in made}
    expected = [dense(values[id(tensor)], dim, clusters, 0.5) for tensor, dim, clusters in made]
    for stack in stacks:
        stack.merge_([values[id(tensor)] for tensor in stack.tensors], 0.5)
    for (tensor, *_), wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(values[id(tensor)], wanted, rtol=1e-12, atol=1e-12)


def test_the_deviation_is_0_where_members_are_equal_to_the_bit():
    made = tensors()[:4]
    stacks = stacks_of([(tensor, dim, segments_of(clusters)) for tensor, dim, clusters in made], {})
    total = sum(float((t - dense(t, dim, clusters, 0.0)).square().sum()) for t, dim, clusters in made)
    assert sum(float(stack.deviation(stack.tensors)) for stack in stacks) == pytest.approx(total)
    for stack in stacks:
        stack.merge_(stack.tensors)
        assert float(stack.deviation(stack.tensors)) == 0.0


def test_the_latest_are_kept():
    latest, made = Latest(), []
    for key in [*range(KEPT), 0, KEPT, 0, 1]:
        latest.of(key, lambda key=key: made.append(key))
    assert made == [*range(KEPT), KEPT, 1], "0 was asked for again, so 1 went first"
    assert len(latest) == KEPT

"""Convolutions in double precision, block by block: the same numbers, and what is not unfolded stays plain."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from csgd import blocks
from csgd.blocks import convolved

SHAPES = {  # input, weight, and what else is said
    "image": ((2, 4, 19, 17), (6, 4, 3, 3), {"padding": 1}),
    "stride": ((3, 4, 21, 16), (6, 4, 3, 3), {"stride": 2, "padding": 2}),
    "dilation": ((2, 4, 23, 20), (5, 4, 3, 2), {"dilation": (3, 2), "padding": (0, 2), "stride": (1, 3)}),
    "integers of numpy": ((3, 4, 21, 16), (6, 4, 3, 3), {"stride": np.int64(2), "padding": np.int64(2)}),
    "groups": ((2, 8, 15, 15), (12, 2, 5, 5), {"groups": 4, "padding": 2}),
    "depthwise": ((2, 8, 15, 15), (8, 1, 5, 5), {"groups": 8, "padding": 2}),
    "volume": ((2, 3, 9, 10, 11), (4, 3, 3, 3, 3), {"padding": 1}),
    "long steps": ((2, 3, 12, 12, 12), (4, 3, 2, 2, 2), {"stride": 4}),
    "one row": ((2, 3, 3, 40), (4, 3, 3, 3), {}),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("block", [1, 2000, 20000])
def test_blocks_put_together_are_the_whole(monkeypatch, case, block):
    monkeypatch.setattr(blocks, "LARGE", 0)
    monkeypatch.setattr(blocks, "BLOCK", block)
    shape, kernel, said = SHAPES[case]
    convolve = (F.conv2d, F.conv3d)[len(shape) - 4]
    x, w = (torch.randn(one, dtype=torch.float64, requires_grad=True) for one in (shape, kernel))
    b = torch.randn(kernel[0], dtype=torch.float64, requires_grad=True)
    calls = []

    def counted(*args):
        calls.append(args)
        return convolve(*args)

    whole, parts = convolve(x, w, b, **said), convolved(counted, x, w, b, **said)
    assert len(calls) >= (3 if block == 1 and case != "one row" else 2), "in blocks"
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)
    signs = torch.randn_like(whole)
    for ours, theirs in zip(*(torch.autograd.grad(out, (x, w, b), signs) for out in (parts, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "kernel", "dtype", "said"),
    [
        ((2, 4, 19, 17), (6, 4, 1, 1), torch.float64, {}),
        ((2, 4, 19, 17), (6, 4, 3, 3), torch.float32, {}),
        ((2, 4, 19, 17), (6, 4, 3, 3), torch.float64, {"padding": "same"}),
        ((4, 19, 17), (6, 4, 3, 3), torch.float64, {}),
    ],
    ids=["kernel of one", "float32", "same", "no batch"],
)
def test_what_is_not_unfolded_is_left_alone(monkeypatch, shape, kernel, dtype, said):
    monkeypatch.setattr(blocks, "LARGE", 0)
    monkeypatch.setattr(blocks, "BLOCK", 1)
    x, w, calls = torch.randn(shape, dtype=dtype), torch.randn(kernel, dtype=dtype), []

    def counted(*args):
        calls.append(args)
        return F.conv2d(*args)

    assert torch.equal(convolved(counted, x, w, **said), F.conv2d(x, w, **said))
    assert len(calls) == 1

"""Convolutions in double precision, block by block.

torch has none but by unfolding: a column of k·k·k·C values for each pixel.  Those of a volume are gigabytes, which the
system hands out page by page; blocks that fit in what the process has already take half of the time, or a quarter.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = {F.conv2d, F.conv3d}
LARGE = 32 * 2**20  # bytes of columns: what malloc gives back to the system at once
BLOCK = 16 * 2**20


def convolved(
    convolve: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """What F.conv2d or F.conv3d puts out, up to rounding; where it would unfold much, each image in blocks of rows."""
    plain = isinstance(padding, str) or input.dim() != weight.dim() or input.dtype != torch.float64 or input.is_cuda
    if plain:
        return convolve(input, weight, bias, stride, padding, dilation, groups)
    strides, paddings, dilations = (_each(one, input.dim() - 2) for one in (stride, padding, dilation))
    reaches = [gap * (size - 1) + 1 for gap, size in zip(dilations, weight.shape[2:], strict=True)]

    def rows(sizes: Sequence[int]) -> list[int]:
        return [(size - reach) // step + 1 for size, reach, step in zip(sizes, reaches, strides, strict=True)]

    def columns(images: int, sizes: Sequence[int]) -> int:
        return input.element_size() * images * input.size(1) * weight[0, 0].numel() * math.prod(rows(sizes))

    def in_blocks(part: Tensor, dim: int) -> Tensor:
        large = columns(1, part.shape[2:])
        if dim == part.dim() or large <= BLOCK:
            return convolve(part, weight, bias, strides, 0, dilations, groups)
        many, step, reach = rows(part.shape[2:])[dim - 2], strides[dim - 2], reaches[dim - 2]
        block = math.ceil(many / min(many, math.ceil(large / BLOCK)))
        ends = [(start, min(start + block, many)) for start in range(0, many, block)]
        parts = [part.narrow(dim, step * a, step * (b - 1 - a) + reach) for a, b in ends]
        return torch.cat([in_blocks(one, dim + 1) for one in parts], dim)

    padded = [size + 2 * more for size, more in zip(input.shape[2:], paddings, strict=True)]
    if weight[0, 0].numel() == 1 or columns(len(input), padded) <= LARGE:  # a kernel of one value unfolds nothing
        return convolve(input, weight, bias, stride, padding, dilation, groups)
    input = F.pad(input, [more for one in reversed(paddings) for more in (one, one)])
    return torch.cat([in_blocks(image, 2) for image in input.split(1)])


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence):  # one of numpy's too
        return (int(value),) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)

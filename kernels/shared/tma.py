"""Which operands TMA (sm_90 and later) can load, their descriptors, and the boxes of pixels.

Holds no kernel. Other operands take the kernels that compute addresses; results differ by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8repro.kernels.shared.launch import cdiv

ALIGNMENT = 16  # bytes, of addresses and of every stride but the last


def fits(t: Tensor) -> bool:
    """True when a descriptor can stand for the tensor as it lies in memory, its last dimension contiguous."""
    size = t.element_size()
    strides = [stride for length, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if length > 1]
    contiguous = t.stride(-1) == 1 or t.shape[-1] == 1
    return (
        contiguous
        and t.numel() > 0
        and t.data_ptr() % ALIGNMENT == 0
        and all(stride > 0 and stride * size % ALIGNMENT == 0 for stride in strides)
    )


def describe(t: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """The descriptor of a tensor that `fits`, read in blocks of that shape; beyond its ends it holds zeros."""
    size = t.element_size()
    strides = list(t.stride())
    strides[-1] = 1
    # The stride of a dimension of one element is never used, but must be valid.
    below = cdiv(t.shape[-1] * size, ALIGNMENT) * ALIGNMENT // size
    for d in range(t.dim() - 2, -1, -1):
        if t.shape[d] == 1:
            strides[d] = below
        below = max(below, strides[d] * t.shape[d])
    return TensorDescriptor(t, list(t.shape), strides, list(block))


def pixel_view(t: Tensor, step: int) -> Tensor | None:
    """[B, H, W, C] as [B, H / step, step, W / step, step * C]; None where pixels do not divide."""
    batch, height, width, channels = t.shape
    if height % step or width % step:
        return None
    return t.view(batch, height // step, step, width // step, step * channels)


@lru_cache(maxsize=1024)
def box(batch: int, height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns (powers of two) of boxes of `pixels` that cover an image with the least waste.

    Of equal ones the flattest, so that the taps of neighbouring boxes meet in the cache.
    """
    choices = []
    columns = 1
    while columns <= pixels:
        rows = 1
        while rows * columns <= pixels:
            sides = ((batch, pixels // (rows * columns)), (height, rows), (width, columns))
            covered = 1
            for size, side in sides:
                covered *= cdiv(size, side) * side
            # A descriptor's block has at most 256 elements a side.
            if max(side for _, side in sides) <= 256:
                choices.append((covered, -min(rows, columns), -columns, (sides[0][1], rows, columns)))
            rows *= 2
        columns *= 2
    return min(choices)[-1]

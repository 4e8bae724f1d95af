"""Products as torch operators, so that torch.compile, CUDA graphs and the profiler understand them.

Products have no derivatives here: how the error of a product is rounded, and with which random bits, is known to
precision/functional.py alone. Where nothing is traced, kernels are called without their operators (`guards.untraced`).
The operators `quantize` and `round_into`, of all engines, are in engines/quantizer.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fp8repro.engines.guards import read, spell, untraced
from fp8repro.engines.products import Conv2dGeometry
from fp8repro.kernels.conv2d import launch as convolution
from fp8repro.kernels.matmul import launch as product
from fp8repro.kernels.quantize import launch as quantize
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding
from fp8repro.numerics.streams import StreamSlot, signed64


@torch.library.custom_op("fp8repro::round_transpose", mutates_args=("codes", "transposed", "stats"))
def round_transpose(
    x: Tensor, how: str, seed: int, stream: int, codes: Tensor, transposed: Tensor, stats: Tensor | None
) -> None:
    """See `kernels.quantize`; rounding, seed and stream as in `round_into`."""
    quantize.round_transpose(x, read(how), RandomBits(seed, stream), stats, (codes, transposed))


def transpose_engine(
    x: Tensor, how: Rounding, bits: RandomBits, codes: Tensor, transposed: Tensor, stats: Tensor | None
) -> None:
    """`round_transpose` with the signature of the quantizer's engines; as an operator only where somebody traces."""
    if isinstance(bits.stream, StreamSlot) or untraced(x, codes, transposed, stats):
        quantize.round_transpose(x.detach(), how, bits, stats, (codes, transposed))
        increment_version([codes, transposed])
        return
    round_transpose(x, spell(how), signed64(bits.seed), signed64(bits.stream), codes, transposed, stats)


# The rounding that changes nothing, as operators take it.
AS_IT_IS = spell(IDENTITY)


def _epilogue(how: str, seed: int, stream: int, codes: bool) -> product.Epilogue:
    """What rounds a result to a format's FP32 values, or its codes."""
    return product.Epilogue(read(how), RandomBits(seed, stream), codes)


def _dtype(how: str = AS_IT_IS, seed: int = 0, stream: int = 0, codes: bool = False) -> torch.dtype:
    """The dtype of a result that is rounded so."""
    return _epilogue(how, seed, stream, codes).dtype


@torch.library.custom_op("fp8repro::matmul", mutates_args=())
def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    inverse_scale: float,
    accumulate: str,
    how: str = AS_IT_IS,
    seed: int = 0,
    stream: int = 0,
    codes: bool = False,
) -> Tensor:
    """a [..., M, K] @ b [..., K, N] * inverse_scale + bias -> FP32 [..., M, N], rounded; see `kernels.matmul`."""
    epilogue = _epilogue(how, seed, stream, codes)
    return product.matmul(a, b, bias, inverse_scale=inverse_scale, accumulate=accumulate, epilogue=epilogue)


@matmul.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None, inverse_scale: float, accumulate: str, *rounding: Any) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=_dtype(*rounding))


def geometry_of(stride: list[int], padding: list[int], dilation: list[int]) -> Conv2dGeometry:
    """A geometry from an operator's lists of two."""
    return Conv2dGeometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))


def _empty_channels_last(
    like: Tensor, shape: tuple[int, ...] | list[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    batch, channels, height, width = shape
    return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


@torch.library.custom_op("fp8repro::conv2d", mutates_args=())
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    inverse_scale: float,
    accumulate: str,
    how: str = AS_IT_IS,
    seed: int = 0,
    stream: int = 0,
    codes: bool = False,
) -> Tensor:
    """x [B, C, H, W], weight [O, C, R, S] -> FP32 [B, O, P, Q], channels_last, rounded; see `kernels.conv2d`."""
    geometry = geometry_of(stride, padding, dilation)
    epilogue = _epilogue(how, seed, stream, codes)
    return convolution.conv2d(
        x, weight, bias, geometry, inverse_scale=inverse_scale, accumulate=accumulate, epilogue=epilogue
    )


@conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    inverse_scale: float,
    accumulate: str,
    *rounding: Any,
) -> Tensor:
    geometry = geometry_of(stride, padding, dilation)
    return _empty_channels_last(x, convolution.output_size(x.shape, weight.shape, geometry), _dtype(*rounding))


@torch.library.custom_op("fp8repro::conv2d_error", mutates_args=())
def conv2d_error(
    error: Tensor,
    weight: Tensor,
    input_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    inverse_scale: float,
    accumulate: str,
    how: str = AS_IT_IS,
    seed: int = 0,
    stream: int = 0,
    codes: bool = False,
) -> Tensor:
    """error [B, O, P, Q], weight [O, C, R, S] -> FP32 [B, C, H, W], channels_last, rounded; see `kernels.conv2d`."""
    geometry = geometry_of(stride, padding, dilation)
    epilogue = _epilogue(how, seed, stream, codes)
    return convolution.conv2d_error(
        error,
        weight,
        tuple(input_shape),
        geometry,
        inverse_scale=inverse_scale,
        accumulate=accumulate,
        epilogue=epilogue,
    )


@conv2d_error.register_fake
def _(
    error: Tensor,
    weight: Tensor,
    input_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    inverse_scale: float,
    accumulate: str,
    *rounding: Any,
) -> Tensor:
    return _empty_channels_last(error, input_shape, _dtype(*rounding))


@torch.library.custom_op("fp8repro::conv2d_gradient", mutates_args=())
def conv2d_gradient(
    error: Tensor,
    x: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    inverse_scale: float,
    accumulate: str,
) -> Tensor:
    """error [B, O, P, Q], x [B, C, H, W] -> FP32 [O, C, R, S], channels_last; see `kernels.conv2d`."""
    geometry = geometry_of(stride, padding, dilation)
    return convolution.conv2d_gradient(
        error, x, tuple(weight_shape), geometry, inverse_scale=inverse_scale, accumulate=accumulate
    )


@conv2d_gradient.register_fake
def _(
    error: Tensor,
    x: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    inverse_scale: float,
    accumulate: str,
) -> Tensor:
    return _empty_channels_last(error, weight_shape)

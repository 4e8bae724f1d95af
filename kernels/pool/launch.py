"""Max pooling, forward and backward: values and gradients of torch, a byte an output kept in between.

Values are compared and handed on in FP32; gradients of overlapping windows are added in the order of torch's CPU
kernel, so that they are its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fp8repro.kernels.pool import device as kernels
from fp8repro.kernels.quantize.launch import raw_codes
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import block_size, capability, cdiv, check_device, launch
from fp8repro.numerics.rounding import Rounding

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
TAPS = 255  # a window's values have numbers from 0 on, and 255 is none
ELEMENTS, CHANNELS = 1024, 64  # of a program, and at most so many channels
NARROW = (1 << 31) - (1 << 17)  # so many elements have 32-bit offsets, with the masked ones of the last block


class Window(NamedTuple):
    """Rows and columns of a pooling window, its stride, and the padding, which never wins."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result."""
        rows, columns = (
            (size + 2 * padding - kernel) // stride + 1
            for size, kernel, stride, padding in zip((height, width), *self, strict=True)
        )
        return rows, columns

    def options(self) -> dict[str, int]:
        """As the kernels take it."""
        names = ("KERNEL", "STRIDE", "PADDING")
        return {
            f"{name}_{axis}": pair[i] for name, pair in zip(names, self, strict=True) for i, axis in enumerate("HW")
        }


def max_pool(x: Tensor, window: Window, how: Rounding | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Maximum of each window, as `torch.nn.functional.max_pool2d`.

    Args:
        x: [B, C, H, W] of any floating-point dtype; a copy is made unless it is channels_last.
        window: padding at most half of the kernel, as in torch; a kernel of at most 255 values.
        how: rounding, without random bits, whose codes of the result are written in the same pass.

    Returns:
        FP32 [B, C, P, Q], uint8 numbers of the taps that won, and codes where asked for; all channels_last.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    if how is not None and (how.is_stochastic or how.format.dtype is None):
        raise ValueError(f"how: got {how}, expected a rounding without random bits to a format with a storage dtype")
    _check(x, "x", x.shape)
    height, width = x.shape[2:]
    rows, columns = _result_size(window, height, width)
    shape = (*x.shape[:2], rows, columns)
    y, taps = _empty(x, shape, torch.float32), _empty(x, shape, torch.uint8)
    codes = None if how is None else _empty(x, shape, how.format.dtype)
    raw = codes if codes is None or codes.dtype == torch.float32 else raw_codes(codes)
    encoding = None if how is None else codec.encoding(how, capability(x.device))
    _launch(kernels.max_pool, (_rows(x), y, taps, raw), y, max(x.numel(), y.numel()), window, x, y, ENCODING=encoding)
    return y, taps, codes


def max_pool_backward(grad: Tensor, taps: Tensor, input_size: Sequence[int], window: Window) -> Tensor:
    """Gradient of the input, FP32 [B, C, H, W], channels_last.

    Args:
        grad: of the result, of any floating-point dtype.
        taps: what `max_pool` gave.
        input_size: of the input.
        window: see `max_pool`.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    _check(grad, "grad", taps.shape)
    shape = (*input_size[:2], *_result_size(window, *input_size[2:]))
    if tuple(taps.shape) != shape or taps.dtype != torch.uint8 or taps.device != grad.device:
        given = f"{taps.dtype} of shape {tuple(taps.shape)} on {taps.device}"
        raise ValueError(f"taps: got {given}, expected torch.uint8 of shape {shape} on {grad.device}")
    grad_x = _empty(grad, tuple(input_size), torch.float32)
    tensors = (_rows(grad), _rows(taps), grad_x)
    _launch(kernels.max_pool_gradient, tensors, grad_x, grad_x.numel(), window, grad_x, grad)
    return grad_x


def _launch(
    kernel: object,
    tensors: tuple[Tensor | None, ...],
    written: Tensor,
    largest: int,
    window: Window,
    x: Tensor,
    y: Tensor,
    **options: codec.Encoding | None,
) -> None:
    channels = written.shape[1]
    pixels = written.numel() // max(1, channels)
    block = block_size(min(CHANNELS, triton.next_power_of_2(max(1, channels))), channels, 512)
    height = block_size(max(1, ELEMENTS // block), pixels, max(1, (1 << 16) // block))
    sizes = (pixels, *x.shape[2:], *y.shape[2:], channels)
    grid = (cdiv(pixels, height), cdiv(channels, block))
    shared = {"ROWS": height, "BLOCK": block, "WIDE": largest > NARROW}
    launch(kernel, grid, written.device, *tensors, *sizes, **options, **window.options(), **shared)


def _result_size(window: Window, height: int, width: int) -> tuple[int, int]:
    for kernel, stride, padding in zip(*window, strict=True):
        if kernel < 1 or stride < 1 or not 0 <= padding <= kernel // 2:
            raise ValueError(f"window: got {window}, expected padding of at most half of the kernel, strides over 0")
    if window.kernel[0] * window.kernel[1] > TAPS:
        raise ValueError(f"window: got a kernel of {window.kernel}, expected at most {TAPS} values")
    rows, columns = window.output_size(height, width)
    if min(rows, columns) < 1:
        raise ValueError(f"x: got {height} x {width} pixels, expected at least one window of {window.kernel}")
    return rows, columns


def _check(t: Tensor, name: str, shape: Sequence[int]) -> None:
    check_device(name, t)
    if t.dim() != 4 or t.dtype not in DTYPES or t.shape != torch.Size(shape):
        wanted = f"floating-point {'[B, C, H, W]' if t.dim() != 4 else tuple(shape)}"
        raise ValueError(f"{name}: got {t.dtype} of shape {tuple(t.shape)}, expected {wanted}")


def _rows(t: Tensor) -> Tensor:
    """[B, C, H, W] with the memory of contiguous [B, H, W, C]; a copy unless it is channels_last already."""
    return t.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)

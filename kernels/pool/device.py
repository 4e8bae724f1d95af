"""Triton kernels of max pooling: which tap of the window won is kept as a byte.

A tile is pixels x channels, so that divisions are made once a pixel. Tensors are channels_last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.tiles import to_fp32

# One compiled kernel for all of them.
SIZES = ("pixels", "height", "width", "rows", "columns")


@triton.jit
def _tile(pixels, width, height, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Pixels of a program with their places (image, row, column), channels, and which elements exist.

    Pixels are 64 bits wide only where the tensors need it, because divisions of those are slow.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    pixel = program * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    rest = pixel // width
    return pixel, rest // height, rest % height, pixel % width, channel[None, :], mask


@triton.jit(do_not_specialize=SIZES)
def max_pool(
    x_ptr,
    y_ptr,
    taps_ptr,
    codes_ptr,
    pixels,
    height,
    width,
    rows,
    columns,
    channels,
    ENCODING: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y [.., rows, columns, channels] = maximum of each window of x [.., height, width, channels]; the tap it is from.

    Also, where a pointer is given: the codes of y rounded to ENCODING. As in torch, the first of equal values wins, and
    the last NaN before everything.
    """
    pixel, image, row, column, channel, mask = _tile(pixels, columns, rows, channels, ROWS, BLOCK, WIDE)
    top = row * STRIDE_H - PADDING_H
    left = column * STRIDE_W - PADDING_W
    best = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    # Of a window of negative infinities, its first value.
    first = tl.maximum(-top, 0) * KERNEL_W + tl.maximum(-left, 0)
    tap = tl.broadcast_to(first.to(tl.int32)[:, None], (ROWS, BLOCK))
    for r in tl.static_range(KERNEL_H):
        for s in tl.static_range(KERNEL_W):
            h = top + r
            w = left + s
            inside = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            source = ((image * height + h) * width + w)[:, None] * channels + channel
            x = to_fp32(tl.load(x_ptr + source, mask=mask & inside, other=0.0))
            wins = ((x > best) | (x != x)) & inside
            best = tl.where(wins, x, best)
            tap = tl.where(wins, r * KERNEL_W + s, tap)
    offset = pixel[:, None] * channels + channel
    tl.store(y_ptr + offset, best, mask=mask)
    tl.store(taps_ptr + offset, tap.to(tl.uint8), mask=mask)
    if codes_ptr is not None:
        code = codec.encode(best, None, ENCODING)
        tl.store(codes_ptr + offset, code.to(codes_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def max_pool_gradient(
    grad_ptr,
    taps_ptr,
    grad_x_ptr,
    pixels,
    height,
    width,
    rows,
    columns,
    channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad_x: of each value of x, the gradients of the windows that it won, added in the windows' order from zero on.

    That is the order of torch's CPU kernel.
    """
    pixel, image, h, w, channel, mask = _tile(pixels, width, height, channels, ROWS, BLOCK, WIDE)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    DOWN: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    ACROSS: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    for i in tl.static_range(DOWN):
        for j in tl.static_range(ACROSS):
            row = (h + PADDING_H) // STRIDE_H - (DOWN - 1 - i)
            column = (w + PADDING_W) // STRIDE_W - (ACROSS - 1 - j)
            r = h + PADDING_H - row * STRIDE_H
            s = w + PADDING_W - column * STRIDE_W
            inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns) & (r < KERNEL_H) & (s < KERNEL_W)
            source = ((image * rows + row) * columns + column)[:, None] * channels + channel
            there = mask & inside[:, None]
            tap = tl.load(taps_ptr + source, mask=there, other=255)
            gradient = to_fp32(tl.load(grad_ptr + source, mask=there, other=0.0))
            total += tl.where(tap == (r * KERNEL_W + s).to(tl.uint8)[:, None], gradient, 0.0)
    tl.store(grad_x_ptr + pixel[:, None] * channels + channel, total, mask=mask)

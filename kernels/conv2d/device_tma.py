"""Triton kernels of convolutions whose operands TMA loads (from sm_90 on); no im2col copy.

A descriptor's block is a box of pixels of some images times channels. Pixels outside an image arrive as zeros, which
is what padding means, so no thread computes an address or a mask of an operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.conv2d.device import Positions
from fp8repro.kernels.shared.codec import RANDOM_WORDS, RandomWords
from fp8repro.kernels.shared.tiles import groups_of_row, multiply_add, store_rounded

FARTHEST = tl.constexpr(1024)  # padding, in steps, that positions may lie in


@triton.jit
def _load_pixels(
    x_desc, image, row, column, channel, channels, STEP: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):
    """A box of pixels, STEP apart, as [PIXELS, BLOCK].

    The descriptor is of [batch, height / STEP, STEP, width / STEP, STEP * channels]: a pixel's remainder is a
    coordinate of its own, and (row, column) is the position of the box's first pixel in the image.
    """
    if STEP == 1:
        box = x_desc.load([image, row, 0, column, channel])
    else:
        # Division rounds toward zero; positions in the padding are negative.
        i = (row + STEP * FARTHEST) // STEP - FARTHEST
        j = (column + STEP * FARTHEST) // STEP - FARTHEST
        box = x_desc.load([image, i, row - i * STEP, j, (column - j * STEP) * channels + channel])
    return box.reshape(PIXELS, BLOCK)


@triton.jit(do_not_specialize=[*RANDOM_WORDS, *Positions._fields, "weight_width", "inverse_scale"])
def implicit_gemm_tma(
    x_desc,
    weight_desc,
    bias_ptr,
    y_ptr,
    inverse_scale,
    batch,
    channels,
    outputs,
    grid_h,
    grid_w,
    size_h,
    size_w,
    start_h,
    start_w,
    stride_h,
    stride_w,
    step_h,
    step_w,
    first_h,
    first_w,
    taps_h,
    taps_w,
    apart_h,
    apart_w,
    tap_h,
    tap_w,
    tap_step_h,
    tap_step_w,
    weight_width,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    STEP: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
):
    """`implicit_gemm` over boxes of IMAGES x ROWS x COLUMNS pixels; names are those there.

    weight_desc is of [outputs, taps, channels]. Positions come one by one: as a tuple they would be specialized (see
    `RandomWords`), and every remainder of a strided error's positions would be compiled anew.
    """
    words = RandomWords(seed0, seed1, stream0, stream1)
    BM: tl.constexpr = IMAGES * ROWS * COLUMNS
    across = tl.cdiv(grid_w, COLUMNS)
    down = tl.cdiv(grid_h, ROWS)
    tiles_n = tl.cdiv(outputs, BN)
    tiles = tl.cdiv(batch, IMAGES) * down * across * tiles_n
    blocks = tl.cdiv(channels, BK)
    for work in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # Neighbours share the box of pixels in the L2 cache.
        n0 = work % tiles_n * BN
        box = work // tiles_n
        column0 = box % across * COLUMNS
        row0 = box // across % down * ROWS
        image0 = box // across // down * IMAGES
        accumulator = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(0, taps_h * taps_w * blocks):
            channel = step % blocks * BK
            u = step // blocks // taps_w
            v = step // blocks % taps_w
            row = row0 * STEP + first_h + u * apart_h
            column = column0 * STEP + first_w + v * apart_w
            x = _load_pixels(x_desc, image0, row, column, channel, channels, STEP, BM, BK)
            tap = (tap_h + u * tap_step_h) * weight_width + tap_w + v * tap_step_w
            weight = weight_desc.load([n0, tap, channel]).reshape(BN, BK)
            accumulator = multiply_add(x, weight.T, accumulator, ACCUMULATE)

        y = accumulator * inverse_scale
        n = n0 + tl.arange(0, BN)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0)[None, :]
        pixel = tl.arange(0, BM)
        image = image0 + pixel // (ROWS * COLUMNS)
        i = row0 + pixel // COLUMNS % ROWS
        j = column0 + pixel % COLUMNS
        mask = ((image < batch) & (i < grid_h) & (j < grid_w))[:, None] & (n < outputs)[None, :]
        y_row = (start_h + i * stride_h)[:, None]
        y_column = (start_w + j * stride_w)[:, None]
        # Random bits count elements as they lie: [batch, height, width, outputs].
        pixel_row = ((image.to(tl.int64)[:, None] * size_h + y_row) * size_w + y_column) * outputs
        place = pixel_row + n[None, :]
        groups = None
        if WHOLE_GROUPS:
            groups = groups_of_row(pixel_row, n0, BN)
        store_rounded(y_ptr + place, y, place, groups, mask, words, ENCODING)


GRADIENT_POSITIONS = ["grid_h", "grid_w", "first_h", "first_w", "taps_h", "taps_w", "apart_h", "apart_w"]


@triton.jit(do_not_specialize=[*GRADIENT_POSITIONS, "chunk", "inverse_scale"])
def wgrad_tma(
    error_desc,
    x_desc,
    partial_ptr,
    batch,
    chunk,
    channels,
    outputs,
    grid_h,
    grid_w,
    first_h,
    first_w,
    taps_h,
    taps_w,
    apart_h,
    apart_w,
    inverse_scale,
    ACCUMULATE: tl.constexpr,
    STEP: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """partial[split, outputs, height, width, channels] sums `chunk` boxes of output pixels; a program does one tile.

    error_desc is of [batch, grid_h, grid_w, outputs]. Of `Positions` come those that `wgrad` reads, one by one, as in
    `implicit_gemm_tma`.
    """
    BK: tl.constexpr = IMAGES * ROWS * COLUMNS
    across = tl.cdiv(grid_w, COLUMNS)
    down = tl.cdiv(grid_h, ROWS)
    boxes = tl.cdiv(batch, IMAGES) * down * across
    tiles_m = tl.cdiv(outputs, BM)
    blocks = tl.cdiv(channels, BN)
    work = tl.program_id(0)
    m0 = work % tiles_m * BM
    channel0 = work // tiles_m % blocks * BN
    tap = work // tiles_m // blocks % (taps_h * taps_w)
    split = work // tiles_m // blocks // (taps_h * taps_w)
    away_h = tap // taps_w * apart_h + first_h
    away_w = tap % taps_w * apart_w + first_w
    accumulator = tl.zeros((BM, BN), dtype=tl.float32)
    for box in range(split * chunk, tl.minimum(split * chunk + chunk, boxes)):
        column = box % across * COLUMNS
        row = box // across % down * ROWS
        image = box // across // down * IMAGES
        error = error_desc.load([image, row, column, m0]).reshape(BK, BM)
        x = _load_pixels(x_desc, image, row * STEP + away_h, column * STEP + away_w, channel0, channels, STEP, BK, BN)
        accumulator = multiply_add(error.T, x, accumulator, ACCUMULATE)
    m = m0 + tl.arange(0, BM)
    n = channel0 + tl.arange(0, BN)
    place = ((split.to(tl.int64) * outputs + m[:, None]) * (taps_h * taps_w) + tap) * channels + n[None, :]
    tl.store(partial_ptr + place, accumulator * inverse_scale, mask=(m < outputs)[:, None] & (n < channels)[None, :])

"""Triton kernels of convolutions as implicit matrix products over channels_last tensors; no im2col copy."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fp8repro.kernels.shared.codec import RANDOM_WORDS, RandomWords
from fp8repro.kernels.shared.tiles import groups_of_row, multiply_add, store_rounded


class Axis(NamedTuple):
    """Along one axis, which pixels of an image and which taps of a kernel meet in a convolution.

    Output position `start + i * stride` of `size`, for i < `grid`, sums over taps u < `taps` the source position
    `i * step + first + u * apart` times the kernel's tap `tap + u * tap_step`; positions outside the source are zeros.
    """

    grid: int
    size: int
    start: int
    stride: int
    step: int
    first: int
    taps: int
    apart: int
    tap: int
    tap_step: int


class Positions(NamedTuple):
    """The numbers of `Axis` for rows (_h) and columns (_w), as a kernel gets them.

    In pairs, because two neighbours among a kernel's parameters are one load.
    """

    grid_h: Any
    grid_w: Any
    size_h: Any
    size_w: Any
    start_h: Any
    start_w: Any
    stride_h: Any
    stride_w: Any
    step_h: Any
    step_w: Any
    first_h: Any
    first_w: Any
    taps_h: Any
    taps_w: Any
    apart_h: Any
    apart_w: Any
    tap_h: Any
    tap_w: Any
    tap_step_h: Any
    tap_step_w: Any

    @classmethod
    def of(cls, rows: Axis, columns: Axis) -> Positions:
        """Those of two axes."""
        return cls(*(number for pair in zip(rows, columns, strict=True) for number in pair))


@triton.jit(do_not_specialize=[*RANDOM_WORDS, "inverse_scale"])
def implicit_gemm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    inverse_scale,
    batch,
    x_height,
    x_width,
    channels,
    outputs,
    positions,
    weight_width,
    weight_row,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
):
    """Forward and error (dgrad) products: each output pixel sums taps of a source image times rows of a weight.

    Args:
        x_ptr: source [batch, x_height, x_width, channels].
        weight_ptr: [outputs, height, weight_width, channels], an output's rows `weight_row` apart.
        y_ptr: [batch, positions.size_h, positions.size_w, outputs].
        positions: `Positions`.

    WHOLE_GROUPS: `outputs` is a multiple of 8.
    """
    words = RandomWords(seed0, seed1, stream0, stream1)
    at = positions
    grid_h = at.grid_h
    grid_w = at.grid_w
    pixels = batch * grid_h * grid_w
    tiles_m = tl.cdiv(pixels, BM)
    tiles_n = tl.cdiv(outputs, BN)
    K = at.taps_h * at.taps_w * channels
    for work in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        band = work // (GROUP * tiles_n)
        band_rows = tl.minimum(tiles_m - band * GROUP, GROUP)
        tile_m = band * GROUP + work % (GROUP * tiles_n) % band_rows
        tile_n = work % (GROUP * tiles_n) // band_rows

        m = tile_m * BM + tl.arange(0, BM)
        n = tile_n * BN + tl.arange(0, BN)
        image = m // (grid_h * grid_w)
        i = m // grid_w % grid_h
        j = m % grid_w
        row = (i * at.step_h + at.first_h)[:, None]
        column = (j * at.step_w + at.first_w)[:, None]
        inside_m = (m < pixels)[:, None]
        # 64-bit up to the tile's first image; 32 bits from there on save registers.
        image0 = tile_m * BM // (grid_h * grid_w)
        images = x_ptr + image0.to(tl.int64) * x_height * x_width * channels
        pixel = (((image - image0)[:, None] * x_height + row) * x_width + column) * channels
        weights = weight_ptr + (n % outputs)[None, :] * weight_row
        accumulator = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(0, tl.cdiv(K, BK)):
            k = step * BK + tl.arange(0, BK)
            channel = k % channels
            u = k // channels // at.taps_w
            v = k // channels % at.taps_w
            away_h = (u * at.apart_h)[None, :]
            away_w = (v * at.apart_w)[None, :]
            inside = inside_m & (k < K)[None, :] & (row + away_h >= 0) & (row + away_h < x_height)
            inside = inside & (column + away_w >= 0) & (column + away_w < x_width)
            offset = (away_h * x_width + away_w) * channels + channel[None, :]
            x = tl.load(images + (pixel + offset), mask=inside, other=0.0)
            tap = (at.tap_h + u * at.tap_step_h) * weight_width + at.tap_w + v * at.tap_step_w
            weight_offset = (tap * channels + channel)[:, None]
            weight = tl.load(weights + weight_offset, mask=(k < K)[:, None], other=0.0)
            accumulator = multiply_add(x, weight, accumulator, ACCUMULATE)

        y = accumulator * inverse_scale
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0)[None, :]
        y_row = (at.start_h + i * at.stride_h)[:, None]
        y_column = (at.start_w + j * at.stride_w)[:, None]
        # Random bits count elements as they lie: [batch, height, width, outputs].
        pixel_row = ((image.to(tl.int64)[:, None] * at.size_h + y_row) * at.size_w + y_column) * outputs
        place = pixel_row + n[None, :]
        groups = None
        if WHOLE_GROUPS:
            groups = groups_of_row(pixel_row, tile_n * BN, BN)
        mask = inside_m & (n < outputs)[None, :]
        store_rounded(y_ptr + place, y, place, groups, mask, words, ENCODING)


@triton.jit(do_not_specialize=["inverse_scale"])
def wgrad(
    error_ptr,
    x_ptr,
    partial_ptr,
    pixels,
    chunk,
    x_height,
    x_width,
    channels,
    outputs,
    positions,
    inverse_scale,
    ACCUMULATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Weight gradient (wgrad): partial[split, outputs, height, width, channels] sums `chunk` output pixels.

    Splits are added afterwards in a fixed order, never by atomics, so the result does not depend on scheduling.
    `positions`: those of the forward product; its grid has the errors, its taps are the weight's height and width.
    """
    at = positions
    y_height = at.grid_h
    y_width = at.grid_w
    width = at.taps_w
    row_size = at.taps_h * width * channels
    tiles_m = tl.cdiv(outputs, BM)
    tiles_n = tl.cdiv(row_size, BN)
    for work in range(tl.program_id(0), tiles_m * tiles_n * SPLITS, tl.num_programs(0)):
        split = work // (tiles_m * tiles_n)
        m = work % tiles_m * BM + tl.arange(0, BM)
        n = work // tiles_m % tiles_n * BN + tl.arange(0, BN)
        channel = n % channels
        away_h = (n // channels // width * at.apart_h + at.first_h)[None, :]
        away_w = (n // channels % width * at.apart_w + at.first_w)[None, :]
        offset = (away_h * x_width + away_w) * channels + channel[None, :]
        inside_n = (n < row_size)[None, :]
        start = split * chunk
        end = tl.minimum(start + chunk, pixels)
        accumulator = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(0, tl.cdiv(end - start, BK)):
            k0 = start + step * BK
            k = k0 + tl.arange(0, BK)
            image0 = k0 // (y_height * y_width)
            image = k // (y_height * y_width) - image0
            row = (k // y_width % y_height * at.step_h)[:, None]
            column = (k % y_width * at.step_w)[:, None]
            inside = inside_n & (k < end)[:, None] & (row + away_h >= 0) & (row + away_h < x_height)
            inside = inside & (column + away_w >= 0) & (column + away_w < x_width)
            pixel = ((image[:, None] * x_height + row) * x_width + column) * channels
            images = x_ptr + image0.to(tl.int64) * x_height * x_width * channels
            x = tl.load(images + (pixel + offset), mask=inside, other=0.0)
            errors = error_ptr + k0.to(tl.int64) * outputs
            error_offset = tl.arange(0, BK)[None, :] * outputs + m[:, None]
            error = tl.load(errors + error_offset, mask=(m < outputs)[:, None] & (k < end)[None, :], other=0.0)
            accumulator = multiply_add(error, x, accumulator, ACCUMULATE)
        place = (split.to(tl.int64) * outputs + m[:, None]) * row_size + n[None, :]
        tl.store(partial_ptr + place, accumulator * inverse_scale, mask=(m < outputs)[:, None] & inside_n)


@triton.jit(do_not_specialize=[*RANDOM_WORDS, "splits"])
def sum_splits(
    partial_ptr,
    result_ptr,
    count,
    splits,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result[i], rounded (`store_rounded`): the sum of partial[split, i] over all splits, from the first on."""
    words = RandomWords(seed0, seed1, stream0, stream1)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    mask = index < count
    total = tl.load(partial_ptr + index, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(partial_ptr + tl.cast(split, tl.int64) * count + index, mask=mask, other=0.0)
    groups = first // 8 + tl.arange(0, BLOCK // 8)
    store_rounded(result_ptr + index, total, index, groups, mask, words, ENCODING)

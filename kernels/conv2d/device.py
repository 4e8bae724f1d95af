"""Triton kernels of convolutions as implicit matrix products over channels_last tensors; no im2col copy."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.quantize.device import RANDOM_WORDS
from fp8repro.kernels.shared.tiles import groups_of_row, multiply_add, store_rounded


@triton.jit(
    do_not_specialize=[*RANDOM_WORDS, "inverse_scale", "tap_h", "tap_w", "first_h", "first_w", "start_h", "start_w"]
)
def gather_product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    overflow_ptr,
    inverse_scale,
    batch,
    x_height,
    x_width,
    channels,
    outputs,
    grid_h,
    grid_w,
    y_height,
    y_width,
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
    weight_row,
    seed0,
    seed1,
    stream0,
    stream1,
    MAX: tl.constexpr,
    EB: tl.constexpr,
    MB: tl.constexpr,
    INF: tl.constexpr,
    ROUNDING: tl.constexpr,
    SATURATE: tl.constexpr,
    SUBNORMAL_NEAREST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
):
    """Forward and error products: each output pixel sums taps of a source image times rows of a weight.

    Output pixel (i, j) of the grid lies at (start_h + i * stride_h, ...) of y [batch, y_height, y_width, outputs] and
    sums, over taps (u, v) and channels, x[batch, i * step_h + first_h + u * apart_h, ...] (zero outside)
    times weight[output, tap_h + u * tap_step_h, tap_w + v * tap_step_w, channel]. WHOLE_GROUPS: `outputs` is a multiple
    of 8.
    """
    pixels = batch * grid_h * grid_w
    tiles_m = tl.cdiv(pixels, BM)
    tiles_n = tl.cdiv(outputs, BN)
    K = taps_h * taps_w * channels
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
        row = (i * step_h + first_h)[:, None]
        column = (j * step_w + first_w)[:, None]
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
            u = k // channels // taps_w
            v = k // channels % taps_w
            away_h = (u * apart_h)[None, :]
            away_w = (v * apart_w)[None, :]
            inside = inside_m & (k < K)[None, :] & (row + away_h >= 0) & (row + away_h < x_height)
            inside = inside & (column + away_w >= 0) & (column + away_w < x_width)
            offset = (away_h * x_width + away_w) * channels + channel[None, :]
            x = tl.load(images + (pixel + offset), mask=inside, other=0.0)
            tap = (tap_h + u * tap_step_h) * weight_width + tap_w + v * tap_step_w
            weight_offset = (tap * channels + channel)[:, None]
            weight = tl.load(weights + weight_offset, mask=(k < K)[:, None], other=0.0)
            accumulator = multiply_add(x, weight, accumulator, ACCUMULATE)

        result = accumulator * inverse_scale
        if bias_ptr is not None:
            result += tl.load(bias_ptr + n, mask=n < outputs, other=0.0)[None, :]
        y_row = (start_h + i * stride_h)[:, None]
        y_column = (start_w + j * stride_w)[:, None]
        # Random bits count elements as they lie: [batch, height, width, outputs].
        pixel_row = ((image.to(tl.int64)[:, None] * y_height + y_row) * y_width + y_column) * outputs
        place = pixel_row + n[None, :]
        groups = None
        if WHOLE_GROUPS:
            groups = groups_of_row(pixel_row, tile_n * BN, BN)
        mask = inside_m & (n < outputs)[None, :]
        store_rounded(
            y_ptr + place,
            result,
            place,
            groups,
            mask,
            overflow_ptr,
            seed0,
            seed1,
            stream0,
            stream1,
            MAX,
            EB,
            MB,
            INF,
            ROUNDING,
            SATURATE,
            SUBNORMAL_NEAREST,
        )


@triton.jit(do_not_specialize=["inverse_scale"])
def weight_gradient(
    error_ptr,
    x_ptr,
    partial_ptr,
    inverse_scale,
    pixels,
    chunk,
    y_height,
    y_width,
    x_height,
    x_width,
    channels,
    outputs,
    height,
    width,
    step_h,
    step_w,
    first_h,
    first_w,
    apart_h,
    apart_w,
    ACCUMULATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradient product: partial[split, outputs, height, width, channels] sums `chunk` output pixels.

    Splits are added afterwards in a fixed order, never by atomics, so the result does not depend on scheduling.
    """
    columns = height * width * channels
    tiles_m = tl.cdiv(outputs, BM)
    tiles_n = tl.cdiv(columns, BN)
    for work in range(tl.program_id(0), tiles_m * tiles_n * SPLITS, tl.num_programs(0)):
        split = work // (tiles_m * tiles_n)
        m = work % tiles_m * BM + tl.arange(0, BM)
        n = work // tiles_m % tiles_n * BN + tl.arange(0, BN)
        channel = n % channels
        away_h = (n // channels // width * apart_h + first_h)[None, :]
        away_w = (n // channels % width * apart_w + first_w)[None, :]
        offset = (away_h * x_width + away_w) * channels + channel[None, :]
        inside_n = (n < columns)[None, :]
        start = split * chunk
        end = tl.minimum(start + chunk, pixels)
        accumulator = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(0, tl.cdiv(end - start, BK)):
            k0 = start + step * BK
            k = k0 + tl.arange(0, BK)
            image0 = k0 // (y_height * y_width)
            image = k // (y_height * y_width) - image0
            row = (k // y_width % y_height * step_h)[:, None]
            column = (k % y_width * step_w)[:, None]
            inside = inside_n & (k < end)[:, None] & (row + away_h >= 0) & (row + away_h < x_height)
            inside = inside & (column + away_w >= 0) & (column + away_w < x_width)
            pixel = ((image[:, None] * x_height + row) * x_width + column) * channels
            images = x_ptr + image0.to(tl.int64) * x_height * x_width * channels
            x = tl.load(images + (pixel + offset), mask=inside, other=0.0)
            errors = error_ptr + k0.to(tl.int64) * outputs
            error_offset = tl.arange(0, BK)[None, :] * outputs + m[:, None]
            error = tl.load(errors + error_offset, mask=(m < outputs)[:, None] & (k < end)[None, :], other=0.0)
            accumulator = multiply_add(error, x, accumulator, ACCUMULATE)
        place = (split.to(tl.int64) * outputs + m[:, None]) * columns + n[None, :]
        tl.store(partial_ptr + place, accumulator * inverse_scale, mask=(m < outputs)[:, None] & inside_n)

"""Triton kernels of batch and layer normalization; inputs may be FP8, and codes of results are stored beside them.

Statistics and normalization are FP32; partial sums are added in FP64 and in a fixed order, never by atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import RANDOM_WORDS, RandomWords
from fp8repro.kernels.shared.tiles import groups_of_row, store_rounded, to_fp32


@triton.jit
def _tile(rows, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's tile: its first row (int64), how many rows there are from it on, and its first channel."""
    across = tl.cdiv(channels, BLOCK)
    first = (tl.program_id(0) // across).to(tl.int64) * ROWS
    return first, tl.minimum(rows - first, ROWS).to(tl.int32), tl.program_id(0) % across * BLOCK


@triton.jit
def _inside(left, channel, channels, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """What of a tile lies in the tensor. WHOLE: all of it, which spares every load and store its mask."""
    return ((tl.arange(0, ROWS) < left)[:, None] & (channel < channels)) | WHOLE


@triton.jit
def _places(first, channel, channels, ROWS: tl.constexpr):
    """Where a tile begins (64 bits), and its elements from there on (32 bits, which save registers)."""
    return first * channels, tl.arange(0, ROWS)[:, None] * channels + channel


@triton.jit
def channel_statistics(
    x_ptr, partial_ptr, rows, channels, chunk, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """partial[chunk, 0 or 1, channel]: mean, and sum of squared deviations, of `chunk` rows of x [rows, channels].

    WHOLE: tiles of ROWS x BLOCK divide the tensor.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(start + chunk, rows)
    inside = channel < channels
    # Shifted by one of the values, which is near the mean: the sum of squares loses no digits.
    origin = to_fp32(tl.load(x_ptr + start * channels + channel, mask=inside, other=0.0))
    # Elementwise over tiles, so that threads exchange sums once, not at every tile.
    totals = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    squares_of = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(start, end, ROWS):
        mask = _inside(tl.minimum(end - first, ROWS).to(tl.int32), channel[None, :], channels, ROWS, WHOLE)
        base, offset = _places(first, channel[None, :], channels, ROWS)
        x = to_fp32(tl.load(x_ptr + base + offset, mask=mask, other=0.0))
        away = tl.where(mask, x - origin[None, :], 0.0)
        totals += away
        squares_of += away * away
    total = tl.sum(totals, 0)
    squares = tl.sum(squares_of, 0)
    count = (end - start).to(tl.float32)
    place = partial_ptr + tl.program_id(1).to(tl.int64) * 2 * channels + channel
    tl.store(place, origin + total / count, mask=inside)
    tl.store(place + channels, squares - total * total / count, mask=inside)


@triton.jit(do_not_specialize=("rows", "chunk"))
def combine_statistics(
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    rows,
    channels,
    chunk,
    momentum,
    eps,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and rstd of each channel from the parts of `channel_statistics` (Chan et al.).

    Also moves the running statistics by `momentum` and counts the batch.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    # The means are taken from one of them before they are squared: no digits are lost.
    origin = tl.load(partial_ptr + channel, mask=inside, other=0.0).to(tl.float64)[None, :]
    totals = tl.zeros((CHUNKS, BLOCK), dtype=tl.float64)
    squares_of = tl.zeros((CHUNKS, BLOCK), dtype=tl.float64)
    chunks = tl.cdiv(rows, chunk)
    for first in range(0, chunks, CHUNKS):
        index = first + tl.arange(0, CHUNKS)[:, None]
        mask = (index < chunks) & inside[None, :]
        place = partial_ptr + index * (2 * channels) + channel[None, :]
        mean = tl.load(place, mask=mask, other=0.0).to(tl.float64)
        squares = tl.load(place + channels, mask=mask, other=0.0).to(tl.float64)
        count = tl.where(index < chunks, tl.minimum(chunk, rows - index * chunk), 0).to(tl.float64)
        totals += count * mean
        away = mean - origin
        squares_of += squares + count * (away * away)
    number = tl.cast(rows, tl.float64)
    inverse = 1.0 / number
    mean = tl.sum(totals, 0)[None, :] * inverse
    away = mean - origin
    variance = tl.sum(squares_of, 0)[None, :] * inverse - away * away
    # Equal values may end a hair under zero. NaN stays, so that a diverged run is seen.
    variance = tl.where(variance < 0, 0.0, variance)
    place, inside = channel[None, :], inside[None, :]
    tl.store(mean_ptr + place, mean.to(tl.float32), mask=inside)
    tl.store(rstd_ptr + place, (1.0 / tl.sqrt(variance + eps)).to(tl.float32), mask=inside)
    running = tl.load(running_mean_ptr + place, mask=inside, other=0.0)
    running += momentum * (mean.to(tl.float32) - running)
    tl.store(running_mean_ptr + place, running, mask=inside)
    running = tl.load(running_var_ptr + place, mask=inside, other=0.0)
    unbiased = variance * (number / (number - 1))
    running += momentum * (unbiased.to(tl.float32) - running)
    tl.store(running_var_ptr + place, running, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def _store_codes(pointers, x, mask, ENCODING: tl.constexpr):
    """Store the codes of a rounding without random bits."""
    code = codec.encode(x, None, ENCODING)
    tl.store(pointers, code.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _flag_bytes(
    flags_ptr, first, left, channel0, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Where the flags of a tile lie, eight channels a byte [ROWS, BLOCK // 8], and which of them there are."""
    eighth = (channel0 // 8 + tl.arange(0, BLOCK // 8))[None, :]
    bytes_a_row = tl.cdiv(channels, 8)
    place = flags_ptr + first * bytes_a_row + (tl.arange(0, ROWS)[:, None] * bytes_a_row + eighth)
    return place, _inside(left, eighth * 8, channels, ROWS, WHOLE)


@triton.jit
def batch_apply(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    codes_ptr,
    kept_ptr,
    flags_ptr,
    rows,
    channels,
    ENCODING: tl.constexpr,
    KEPT: tl.constexpr,
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = relu(normalized x + residual) of x [rows, channels]; flags say where the ReLU let it pass.

    Stored where pointers are given: y, the codes of y rounded to ENCODING, those of x in KEPT, which holds its values.
    Flags are a bit a channel, each row's in whole bytes. WHOLE: tiles divide the tensor.
    """
    first, left, channel0 = _tile(rows, channels, ROWS, BLOCK)
    channel = (channel0 + tl.arange(0, BLOCK))[None, :]
    mask = _inside(left, channel, channels, ROWS, WHOLE)
    base, offset = _places(first, channel, channels, ROWS)
    x = to_fp32(tl.load(x_ptr + base + offset, mask=mask, other=0.0))
    if kept_ptr is not None:
        _store_codes(kept_ptr + base + offset, x, mask, KEPT)
    inside = (channel < channels) | WHOLE
    scale = tl.load(rstd_ptr + channel, mask=inside, other=0.0) * tl.load(weight_ptr + channel, mask=inside, other=0.0)
    y = (x - tl.load(mean_ptr + channel, mask=inside, other=0.0)) * scale
    y += tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if residual_ptr is not None:
        y += to_fp32(tl.load(residual_ptr + base + offset, mask=mask, other=0.0))
    if RELU:
        passed = (y > 0) & mask
        # NaN passes, so that a diverged run is seen.
        y = tl.where(y <= 0, 0.0, y)
        bits = tl.reshape(passed.to(tl.int32), [ROWS, BLOCK // 8, 8]) << tl.arange(0, 8)[None, None, :]
        place, whole = _flag_bytes(flags_ptr, first, left, channel0, channels, ROWS, BLOCK, WHOLE)
        tl.store(place, tl.sum(bits, 2).to(tl.uint8), mask=whole)
    if y_ptr is not None:
        tl.store(y_ptr + base + offset, y, mask=mask)
    if codes_ptr is not None:
        _store_codes(codes_ptr + base + offset, y, mask, ENCODING)


@triton.jit
def _gradient(
    grad_ptr,
    more_ptr,
    flags_ptr,
    first,
    left,
    channel0,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile [ROWS, BLOCK] of the result's gradient, of two terms where there are two, where the ReLU let it pass."""
    channel = (channel0 + tl.arange(0, BLOCK))[None, :]
    mask = _inside(left, channel, channels, ROWS, WHOLE)
    base, offset = _places(first, channel, channels, ROWS)
    gradient = to_fp32(tl.load(grad_ptr + base + offset, mask=mask, other=0.0))
    if more_ptr is not None:
        gradient += to_fp32(tl.load(more_ptr + base + offset, mask=mask, other=0.0))
    if flags_ptr is not None:
        # One load for the bits of eight channels: a load for each element would take most of the time.
        place, whole = _flag_bytes(flags_ptr, first, left, channel0, channels, ROWS, BLOCK, WHOLE)
        byte = tl.load(place, mask=whole, other=0)
        bits = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        gradient = tl.where(tl.reshape(bits, [ROWS, BLOCK]) != 0, gradient, 0.0)
    return gradient


@triton.jit
def batch_gradient_sums(
    grad_ptr,
    more_ptr,
    flags_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    rows,
    channels,
    chunk,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[chunk, 0 or 1, channel]: sums of the gradient, and of the gradient times the normalized input."""
    channel0 = tl.program_id(0) * BLOCK
    channel = channel0 + tl.arange(0, BLOCK)
    start = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(start + chunk, rows)
    inside = channel < channels
    mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + channel, mask=inside, other=0.0)[None, :]
    totals = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(start, end, ROWS):
        left = tl.minimum(end - first, ROWS).to(tl.int32)
        mask = _inside(left, channel[None, :], channels, ROWS, WHOLE)
        gradient = _gradient(grad_ptr, more_ptr, flags_ptr, first, left, channel0, channels, ROWS, BLOCK, WHOLE)
        base, offset = _places(first, channel[None, :], channels, ROWS)
        x = to_fp32(tl.load(x_ptr + base + offset, mask=mask, other=0.0))
        totals += gradient
        products += tl.where(mask, gradient * ((x - mean) * rstd), 0.0)
    total = tl.sum(totals, 0)
    product = tl.sum(products, 0)
    place = partial_ptr + tl.program_id(1).to(tl.int64) * 2 * channels + channel
    tl.store(place, total, mask=inside)
    tl.store(place + channels, product, mask=inside)


@triton.jit(do_not_specialize=("chunks",))
def combine_gradient_sums(
    partial_ptr, grad_weight_ptr, grad_bias_ptr, channels, chunks, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of weight and bias: the sums of `batch_gradient_sums` over all chunks."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    totals = tl.zeros((CHUNKS, BLOCK), dtype=tl.float64)
    products = tl.zeros((CHUNKS, BLOCK), dtype=tl.float64)
    for first in range(0, chunks, CHUNKS):
        index = first + tl.arange(0, CHUNKS)[:, None]
        mask = (index < chunks) & inside[None, :]
        place = partial_ptr + index * (2 * channels) + channel[None, :]
        totals += tl.load(place, mask=mask, other=0.0).to(tl.float64)
        products += tl.load(place + channels, mask=mask, other=0.0).to(tl.float64)
    tl.store(grad_bias_ptr + channel, tl.sum(totals, 0).to(tl.float32), mask=inside)
    tl.store(grad_weight_ptr + channel, tl.sum(products, 0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=[*RANDOM_WORDS, "inverse_rows"])
def batch_gradient_apply(
    grad_ptr,
    more_ptr,
    flags_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    rows,
    channels,
    inverse_rows,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the input, rounded (`store_rounded`), and of the residual, from those of weight and bias."""
    words = RandomWords(seed0, seed1, stream0, stream1)
    first, left, channel0 = _tile(rows, channels, ROWS, BLOCK)
    channel = (channel0 + tl.arange(0, BLOCK))[None, :]
    mask = _inside(left, channel, channels, ROWS, WHOLE)
    base, offset = _places(first, channel, channels, ROWS)
    gradient = _gradient(grad_ptr, more_ptr, flags_ptr, first, left, channel0, channels, ROWS, BLOCK, WHOLE)
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + base + offset, gradient, mask=mask)
    inside = (channel < channels) | WHOLE
    rstd = tl.load(rstd_ptr + channel, mask=inside, other=0.0)
    x = to_fp32(tl.load(x_ptr + base + offset, mask=mask, other=0.0))
    normalized = (x - tl.load(mean_ptr + channel, mask=inside, other=0.0)) * rstd
    total = tl.load(grad_bias_ptr + channel, mask=inside, other=0.0)
    product = tl.load(grad_weight_ptr + channel, mask=inside, other=0.0)
    centred = gradient - (total + normalized * product) * inverse_rows
    result = centred * (rstd * tl.load(weight_ptr + channel, mask=inside, other=0.0))
    # Random bits count elements as they lie: [rows, channels].
    groups = None
    if WHOLE_GROUPS:
        row = (first + tl.arange(0, ROWS))[:, None] * channels
        groups = groups_of_row(row, channel0, BLOCK)
    store_rounded(grad_x_ptr + base + offset, result, base + offset, groups, mask, words, ENCODING)


@triton.jit
def add(a_ptr, b_ptr, sum_ptr, count, BLOCK: tl.constexpr):
    """FP32 sums of two tensors that may be FP8."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    mask = offset < tl.minimum(count - base, BLOCK).to(tl.int32)
    a = to_fp32(tl.load(a_ptr + base + offset, mask=mask, other=0.0))
    b = to_fp32(tl.load(b_ptr + base + offset, mask=mask, other=0.0))
    tl.store(sum_ptr + base + offset, a + b, mask=mask)


@triton.jit
def layer_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    codes_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    eps,
    ENCODING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize ROWS whole rows of [rows, width], and keep mean and rstd of each.

    Where a pointer is given, the codes of the result rounded to ENCODING are stored too.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    mask = (row < rows)[:, None] & inside
    offset = row[:, None] * width + column
    x = to_fp32(tl.load(x_ptr + offset, mask=mask, other=0.0))
    mean = tl.sum(x, 1) / width
    away = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(away * away, 1) / width + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = away * rstd[:, None] * tl.load(weight_ptr + column, mask=inside, other=0.0)
    y += tl.load(bias_ptr + column, mask=inside, other=0.0)
    tl.store(y_ptr + offset, y, mask=mask)
    if codes_ptr is not None:
        _store_codes(codes_ptr + offset, y, mask, ENCODING)


@triton.jit
def layer_backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the input; partial[program, 0 or 1, width] sums those of weight and bias."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside
        offset = row[:, None] * width + column
        gradient = to_fp32(tl.load(grad_ptr + offset, mask=mask, other=0.0))
        x = to_fp32(tl.load(x_ptr + offset, mask=mask, other=0.0))
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        normalized = tl.where(mask, (x - mean) * rstd, 0.0)
        grad_weight += tl.sum(gradient * normalized, 0)
        grad_bias += tl.sum(gradient, 0)
        weighted = gradient * weight
        total = tl.sum(weighted, 1)[:, None] / width
        product = tl.sum(weighted * normalized, 1)[:, None] / width
        result = (weighted - total - normalized * product) * rstd
        tl.store(grad_x_ptr + offset, result, mask=mask)
    place = partial_ptr + tl.program_id(0) * 2 * width + tl.arange(0, BLOCK)
    tl.store(place, grad_weight, mask=tl.arange(0, BLOCK) < width)
    tl.store(place + width, grad_bias, mask=tl.arange(0, BLOCK) < width)

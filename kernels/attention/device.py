"""Triton kernels of what lies between a Transformer's products: roundings between layouts, softmax, residual sums.

Each rounds what it computes on the way to the next product, in both layouts that products want. Sums are FP32; nothing
here may choose a rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import RandomWords
from fp8repro.kernels.shared.tiles import draws_of_tile, rounded_tile, to_fp32, uniform_of_tile

# Streams of up to three tensors, each with two roundings. One by one: see `codec.RandomWords`.
SEED = ["seed0", "seed1"]
THREE_STREAMS = [f"{name}{word}" for name in ("a", "b", "c") for word in (0, 1)]
TWICE_THREE_STREAMS = [*THREE_STREAMS, *(f"{name}{word}" for name in ("d", "e", "f") for word in (0, 1))]


@triton.jit
def _store_both(codes_ptr, turned_ptr, codes_at, turned_at, code, mask):
    """Store a tile's codes, and those of its transpose where a pointer is given."""
    code = code.to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + codes_at, code, mask=mask)
    if turned_ptr is not None:
        tl.store(turned_ptr + turned_at, tl.trans(code), mask=tl.trans(mask))


@triton.jit
def _reround(
    x_ptr, codes_ptr, turned_ptr, mask_ptr, layout, scale, before, words, columns, inner,
    FIRST: tl.constexpr, ENCODING: tl.constexpr, RELU: tl.constexpr, X_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    outers, rows, parts, size, x_outer, x_inner, x_row, x_column = layout[:8]
    out_outer, out_inner, out_row, turned_outer, turned_inner, turned_column = layout[8:]
    across = tl.cdiv(columns, BLOCK)
    outer = (tl.program_id(1) // inner).to(tl.int64)
    plane = (tl.program_id(1) % inner).to(tl.int64)
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = tl.program_id(0) % across * BLOCK
    column = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    mask = (row < rows) & (column < columns) & (outer < outers)
    start = outer * x_outer + plane * x_inner + row * x_row
    at = start + column * x_column
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    for part in range(1, parts):
        x += tl.load(x_ptr + tl.cast(part, tl.int64) * size + at, mask=mask, other=0.0)
    if X_GROUPS:
        x = rounded_tile(x, start, first, before, FIRST, True, BLOCK)
    elif FIRST.mantissa_bits < 23:
        draw = codec.draw_of_index(at, before)
        x = codec.decode(codec.encode(x, draw, FIRST), FIRST)
    x *= scale
    start = outer * out_outer + plane * out_inner + row * out_row
    if RELU:
        # NaN passes, so that a diverged run is seen.
        x = tl.where(x <= 0, 0.0, x)
    if mask_ptr is not None:
        passed = to_fp32(tl.load(mask_ptr + start + column, mask=mask, other=0.0))
        x = tl.where(passed <= 0, 0.0, x)
    draw = draws_of_tile(start, first, words, ENCODING, GROUPS, BLOCK)
    code = codec.encode(x, draw, ENCODING)
    turned = outer * turned_outer + plane * turned_inner + tl.trans(column) * turned_column + tl.trans(row)
    _store_both(codes_ptr, turned_ptr, start + column, turned, code, mask)


@triton.jit(do_not_specialize=["scale", *SEED, *TWICE_THREE_STREAMS])
def reround(
    xs, codes, turned, mask_ptr, layout0, layout1, layout2, scale, columns, inner,
    seed0, seed1, a0, a1, b0, b1, c0, c1, d0, d1, e0, e1, f0, f1,
    FIRST: tl.constexpr, ENCODING: tl.constexpr, RELU: tl.constexpr, COUNT: tl.constexpr, X_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round up to three FP32 tensors to FIRST, scale the first of them, round to ENCODING, store codes in both layouts.

    Args:
        xs, codes, turned: pointers, as many as tensors. Elements count as they lie in `xs` for FIRST, and as they lie
            in `codes` for ENCODING.
        mask_ptr: where it is not over zero the result is zero; laid out as the codes.
        layout0, layout1, layout2: of each tensor outer planes, rows, number of parts that add up to it, their
            distance, and strides: of x along planes (outer, inner), rows and columns; of the codes along planes and
            rows; of their transpose along planes and columns.
        inner: planes are counted as outer * inner + inner plane.
        a0 to f1: words of the streams for FIRST of each tensor, then for ENCODING.
    """
    which = tl.program_id(2)
    if which == 0:
        _reround(
            xs[0], codes[0], turned[0], mask_ptr, layout0, scale, RandomWords(seed0, seed1, a0, a1),
            RandomWords(seed0, seed1, d0, d1), columns, inner, FIRST, ENCODING, RELU, X_GROUPS, GROUPS, ROWS, BLOCK,
        )  # fmt: skip
    # What a compiler decides and what a program finds are asked apart.
    if COUNT > 1:  # noqa: SIM102
        if which == 1:
            # A transposed product: elements that count one after the other lie in a column.
            _reround(
                xs[1], codes[1], turned[1], mask_ptr, layout1, 1.0, RandomWords(seed0, seed1, b0, b1),
                RandomWords(seed0, seed1, e0, e1), columns, inner, FIRST, ENCODING, RELU, False, GROUPS, ROWS, BLOCK,
            )  # fmt: skip
    if COUNT > 2:  # noqa: SIM102
        if which == 2:
            _reround(
                xs[2], codes[2], turned[2], mask_ptr, layout2, 1.0, RandomWords(seed0, seed1, c0, c1),
                RandomWords(seed0, seed1, f0, f1), columns, inner, FIRST, ENCODING, RELU, X_GROUPS, GROUPS, ROWS, BLOCK,
            )  # fmt: skip


@triton.jit
def _weights(scores, mask_ptr, row, column, inside, mask_outer, mask_row, outer):
    """The softmax of rows of scores, to which a mask is added."""
    if mask_ptr is not None:
        scores += tl.load(mask_ptr + outer * mask_outer + row * mask_row + column, mask=inside, other=0.0)
    scores = tl.where(inside, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def softmax_forward(
    scores_ptr, mask_ptr, codes_ptr, turned_ptr, kept_ptr,
    rows, columns, inner, mask_outer, mask_row, pitch, turned_pitch,
    ENCODING: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes of the softmax of scores [planes, rows, columns] + mask [planes / inner, rows, columns], in both layouts.

    Also, where a pointer is given, the scores in KEPT, a format that holds them. Rows of the codes lie `pitch` apart.
    """
    plane = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    inside = (row < rows + ROWS) & (column < columns)
    mask = (row < rows) & (column < columns)
    at = (plane * rows + row) * columns + column
    scores = tl.load(scores_ptr + at, mask=mask, other=0.0)
    if kept_ptr is not None:
        tl.store(kept_ptr + at, codec.encode(scores, None, KEPT).to(kept_ptr.dtype.element_ty), mask=mask)
    # Rows beyond the end are made of zeros.
    row_of_mask = tl.minimum(row, rows - 1)
    weights = _weights(scores, mask_ptr, row_of_mask, column, inside, mask_outer, mask_row, plane // inner)
    turned = (plane * columns + tl.trans(column)) * turned_pitch + tl.trans(row)
    code = codec.encode(weights, None, ENCODING)
    _store_both(codes_ptr, turned_ptr, (plane * rows + row) * pitch + column, turned, code, mask)


@triton.jit(do_not_specialize=[*SEED, "a0", "a1", "b0", "b1"])
def softmax_backward(
    grad_ptr, scores_ptr, mask_ptr, codes_ptr, turned_ptr,
    rows, columns, inner, mask_outer, mask_row, pitch, turned_pitch,
    seed0, seed1, a0, a1, b0, b1,
    FIRST: tl.constexpr, ENCODING: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores from that of the weights, which is rounded to FIRST before; codes in both layouts.

    Arguments as those of `softmax_forward`, whose kept scores (or scores) these are.
    """
    plane = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    inside = (row < rows + ROWS) & (column < columns)
    mask = (row < rows) & (column < columns)
    start = (plane * rows + row) * columns
    scores = to_fp32(tl.load(scores_ptr + start + column, mask=mask, other=0.0))
    row_of_mask = tl.minimum(row, rows - 1)
    weights = _weights(scores, mask_ptr, row_of_mask, column, inside, mask_outer, mask_row, plane // inner)
    grad = tl.load(grad_ptr + start + column, mask=mask, other=0.0)
    grad = rounded_tile(grad, start, 0, RandomWords(seed0, seed1, a0, a1), FIRST, GROUPS, BLOCK)
    weighted = tl.where(inside, weights * grad, 0.0)
    result = weighted - weights * tl.sum(weighted, 1)[:, None]
    draw = draws_of_tile(start, 0, RandomWords(seed0, seed1, b0, b1), ENCODING, GROUPS, BLOCK)
    code = codec.encode(result, draw, ENCODING)
    turned = (plane * columns + tl.trans(column)) * turned_pitch + tl.trans(row)
    _store_both(codes_ptr, turned_ptr, (plane * rows + row) * pitch + column, turned, code, mask)


@triton.jit(do_not_specialize=["parts", *SEED, *THREE_STREAMS])
def finish_gradients(
    parts_ptr, turned_ptr, grad_ptr, bias_ptr, parts, M, N, summed, turned_pitch,
    seed0, seed1, a0, a1, b0, b1, c0, c1,
    ENCODING: tl.constexpr, WHOLE_GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of up to three weights [M, N] that one product gave in parts [parts, weights * M, N], each rounded.

    Also, where a pointer is given, those of their biases: the sums of the rows of the transposed errors [weights * M,
    summed].
    """
    weight = tl.program_id(1)
    stream0 = a0
    stream1 = a1
    if weight == 1:
        stream0 = b0
        stream1 = b1
    if weight == 2:
        stream0 = c0
        stream1 = c1
    across = tl.cdiv(N, BN)
    row = (tl.program_id(0) // across * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    first = tl.program_id(0) % across * BN
    column = (first + tl.arange(0, BN))[None, :]
    mask = (row < M) & (column < N)
    at = (weight.to(tl.int64) * M + row) * N + column
    total = tl.load(parts_ptr + at, mask=mask, other=0.0)
    size = tl.num_programs(1).to(tl.int64) * M * N
    for part in range(1, parts):
        total += tl.load(parts_ptr + part * size + at, mask=mask, other=0.0)
    words = RandomWords(seed0, seed1, stream0, stream1)
    tl.store(grad_ptr + at, rounded_tile(total, row * N, first, words, ENCODING, WHOLE_GROUPS, BN), mask=mask)
    if bias_ptr is not None:  # noqa: SIM102
        if first == 0:
            place = weight.to(tl.int64) * M + row
            sums = tl.zeros((BM, BK), dtype=tl.float32)
            for start in range(0, summed, BK):
                k = start + tl.arange(0, BK)[None, :]
                there = (row < M) & (k < summed)
                sums += to_fp32(tl.load(turned_ptr + place * turned_pitch + k, mask=there, other=0.0))
            tl.store(bias_ptr + place, tl.sum(sums, 1)[:, None], mask=row < M)


@triton.jit
def _term(parts_ptr, offset, mask, count, parts, first, words, ENCODING: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.load(parts_ptr + offset, mask=mask, other=0.0)
    for part in range(1, parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * count + offset, mask=mask, other=0.0)
    row = tl.zeros((1, 1), dtype=tl.int64) + first
    return rounded_tile(total, row, 0, words, ENCODING, True, BLOCK)


@triton.jit(do_not_specialize=["parts", *SEED, *THREE_STREAMS])
def sum_rounded(
    added_ptr, first_ptr, second_ptr, third_ptr, sum_ptr, count, parts,
    seed0, seed1, a0, a1, b0, b1, c0, c1,
    ENCODING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum = added + first + second + third, where each but `added` comes in parts [parts, count] and is rounded."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = first + tl.arange(0, BLOCK)[None, :]
    mask = offset < count
    total = _term(first_ptr, offset, mask, count, parts, first, RandomWords(seed0, seed1, a0, a1), ENCODING, BLOCK)
    if added_ptr is not None:
        total = tl.load(added_ptr + offset, mask=mask, other=0.0) + total
    if second_ptr is not None:
        words = RandomWords(seed0, seed1, b0, b1)
        total += _term(second_ptr, offset, mask, count, parts, first, words, ENCODING, BLOCK)
    if third_ptr is not None:
        words = RandomWords(seed0, seed1, c0, c1)
        total += _term(third_ptr, offset, mask, count, parts, first, words, ENCODING, BLOCK)
    tl.store(sum_ptr + offset, total, mask=mask)


@triton.jit
def _dropped(x, row, words, scale, threshold, WHOLE_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros for `threshold` of 2^16 elements, the others times `scale`."""
    draw = uniform_of_tile(row, 0, words, WHOLE_GROUPS, BLOCK)
    return tl.where((draw >> 16).to(tl.int32) < threshold, 0.0, x * scale)


@triton.jit(do_not_specialize=["scale", "threshold", *SEED, "a0", "a1"])
def residual_norm_forward(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, codes_ptr, turned_ptr, mean_ptr, rstd_ptr,
    rows, width, turned_pitch, eps, scale, threshold, seed0, seed1, a0, a1,
    DROPOUT: tl.constexpr, ENCODING: tl.constexpr, WHOLE_GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = layer normalization of x + dropout(branch), rows of [rows, width]; codes of y in both layouts.

    Kept for `residual_norm_backward`: the sum, mean and rstd.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    mask = (row < rows) & inside
    at = row * width + column
    branch = tl.load(branch_ptr + at, mask=mask, other=0.0)
    if DROPOUT:
        words = RandomWords(seed0, seed1, a0, a1)
        branch = _dropped(branch, row * width, words, scale, threshold, WHOLE_GROUPS, BLOCK)
    x = tl.load(x_ptr + at, mask=mask, other=0.0) + branch
    tl.store(sum_ptr + at, x, mask=mask)
    mean = tl.sum(x, 1)[:, None] / width
    away = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(away * away, 1)[:, None] / width + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = away * rstd * tl.load(weight_ptr + column, mask=inside, other=0.0)
    y += tl.load(bias_ptr + column, mask=inside, other=0.0)
    tl.store(y_ptr + at, y, mask=mask)
    turned = tl.trans(column).to(tl.int64) * turned_pitch + tl.trans(row)
    _store_both(codes_ptr, turned_ptr, at, turned, codec.encode(y, None, ENCODING), mask)


@triton.jit(do_not_specialize=["scale", "threshold", *SEED, "a0", "a1", "b0", "b1"])
def residual_norm_backward(
    grad_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_sum_ptr, codes_ptr, turned_ptr, partial_ptr,
    rows, width, turned_pitch, scale, threshold, seed0, seed1, a0, a1, b0, b1,
    DROPOUT: tl.constexpr, ENCODING: tl.constexpr, WHOLE_GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum, and that of the branch rounded to ENCODING in both layouts.

    partial [programs, 0 or 1, width] adds up to the gradients of weight and bias.
    """
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    grad_weight = tl.zeros((1, BLOCK), dtype=tl.float32)
    grad_bias = tl.zeros((1, BLOCK), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & inside
        at = row * width + column
        gradient = tl.load(grad_ptr + at, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        normalized = tl.where(mask, (tl.load(sum_ptr + at, mask=mask, other=0.0) - mean) * rstd, 0.0)
        grad_weight += tl.sum(gradient * normalized, 0)[None, :]
        grad_bias += tl.sum(gradient, 0)[None, :]
        weighted = gradient * weight
        total = tl.sum(weighted, 1)[:, None] / width
        product = tl.sum(weighted * normalized, 1)[:, None] / width
        result = (weighted - total - normalized * product) * rstd
        tl.store(grad_sum_ptr + at, result, mask=mask)
        if DROPOUT:
            words = RandomWords(seed0, seed1, a0, a1)
            result = _dropped(result, row * width, words, scale, threshold, WHOLE_GROUPS, BLOCK)
        words = RandomWords(seed0, seed1, b0, b1)
        draw = draws_of_tile(row * width, 0, words, ENCODING, WHOLE_GROUPS, BLOCK)
        turned = tl.trans(column).to(tl.int64) * turned_pitch + tl.trans(row)
        _store_both(codes_ptr, turned_ptr, at, turned, codec.encode(result, draw, ENCODING), mask)
    place = partial_ptr + tl.program_id(0) * 2 * width + column
    tl.store(place, grad_weight, mask=inside)
    tl.store(place + width, grad_bias, mask=inside)

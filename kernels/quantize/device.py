"""Triton kernels of the quantizer: one pass over memory, statistics included, for each kind of memory layout.

Device code only; launch.py picks the kernel. Must never round through a float8 cast (see codec.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import RANDOM_WORDS, STOCHASTIC, RandomWords


@triton.jit
def load_fp32(pointers, mask):
    """Load FP32, FP16, or BF16 (whose bits are passed as int16) as FP32."""
    raw = tl.load(pointers, mask=mask, other=0)
    if raw.dtype == tl.int16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if raw.dtype == tl.float16:
        # The hardware's conversion drops the sign of NaN.
        sign = (raw.to(tl.int16, bitcast=True).to(tl.int32) & 0x8000) << 16
        magnitude = raw.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return (magnitude | sign).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def store_value(pointers, value, mask):
    """Store FP32 values, as they are or (int16 pointers) as the BF16 values that they are."""
    if pointers.dtype.element_ty == tl.int16:
        tl.store(pointers, (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(pointers, value, mask=mask)


@triton.jit
def round_elements(
    x,
    draw,
    pointers_values,
    pointers_codes,
    mask,
    ENCODING: tl.constexpr,
):
    """Round a tile, store what is wanted of it, and return its codes."""
    code = codec.encode(x, draw, ENCODING)
    if pointers_codes is not None:
        tl.store(pointers_codes, code.to(pointers_codes.dtype.element_ty), mask=mask)
    if pointers_values is not None:
        store_value(pointers_values, codec.decode(code, ENCODING), mask)
    return code


@triton.jit
def statistics_of(x, code, ENCODING: tl.constexpr):
    """What each element adds to the statistics: three counts and a magnitude; masked ones must be zero in `x`."""
    magnitude = tl.abs(x)
    finite = magnitude < float("inf")
    nonzero = finite & (magnitude > 0)
    underflow = nonzero & ((code & ((1 << (ENCODING.exponent_bits + ENCODING.mantissa_bits)) - 1)) == 0)
    overflow = finite & (magnitude > ENCODING.max)
    largest = tl.where(finite, magnitude, 0.0)
    return nonzero.to(tl.int32), underflow.to(tl.int32), overflow.to(tl.int32), largest


@triton.jit
def joined_statistics(a, b):
    """What the elements of two tiles of one shape add, each with its counterpart."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], tl.maximum(a[3], b[3])


@triton.jit
def add_statistics(stats_ptr, statistics):
    """Add a tile of `statistics_of` to the float64 buffer."""
    tl.atomic_add(stats_ptr, tl.sum(statistics[0]).to(tl.float64))
    tl.atomic_add(stats_ptr + 1, tl.sum(statistics[1]).to(tl.float64))
    tl.atomic_add(stats_ptr + 2, tl.sum(statistics[2]).to(tl.float64))
    tl.atomic_max(stats_ptr + 3, tl.max(statistics[3]).to(tl.float64))


@triton.jit(do_not_specialize=RANDOM_WORDS)
def round_flat(
    x_ptr,
    values_ptr,
    codes_ptr,
    stats_ptr,
    count,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All tensors contiguous; with a statistics buffer the grid is small and strides over the blocks."""
    words = RandomWords(seed0, seed1, stream0, stream1)
    # Eight elements a thread share one Philox block, so no random bits move between threads.
    local = tl.max_contiguous(tl.arange(0, BLOCK), 8)
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        base = tl.cast(block, tl.int64) * BLOCK
        mask = local < tl.minimum(count - base, BLOCK).to(tl.int32)
        x = load_fp32(x_ptr + base + local, mask)
        draw = local
        if ENCODING.rounding == STOCHASTIC:
            group = (base >> 3) + tl.arange(0, BLOCK // 8)
            w0, w1, w2, w3 = codec.words_of_blocks(group, words)
            draw = tl.reshape(codec.draws_of_words(w0, w1, w2, w3), [BLOCK])
        values = None if values_ptr is None else values_ptr + base + local
        codes = None if codes_ptr is None else codes_ptr + base + local
        code = round_elements(x, draw, values, codes, mask, ENCODING)
        if stats_ptr is not None:
            add_statistics(stats_ptr, statistics_of(x, code, ENCODING))


@triton.jit(do_not_specialize=RANDOM_WORDS)
def round_columns(
    x_ptr,
    values_ptr,
    codes_ptr,
    stats_ptr,
    columns,
    rows,
    outer_stride,
    row_stride,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tensors that count as [outer, columns, rows] and have columns contiguous in memory: transposed matrices, and
    contiguous images whose elements are counted channels last.

    rows % 8 == 0, so a Philox block covers eight rows of one column and each thread uses all its words. It draws
    for the four neighbouring columns that it loads, so no random bits move between threads.
    """
    words = RandomWords(seed0, seed1, stream0, stream1)
    outer = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), 4)[None, :]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    mask = (column < columns) & (group * 8 < rows)
    draw = group
    if ENCODING.rounding == STOCHASTIC:
        step = rows // 8
        first = outer * columns + tl.program_id(0) * BLOCK + 4 * tl.arange(0, BLOCK // 4)[None, :]
        block = first * step + group
        a0, a1, a2, a3 = codec.words_of_blocks(block, words)
        b0, b1, b2, b3 = codec.words_of_blocks(block + step, words)
        c0, c1, c2, c3 = codec.words_of_blocks(block + 2 * step, words)
        d0, d1, d2, d3 = codec.words_of_blocks(block + 3 * step, words)
        w0 = codec.interleave(a0, b0, c0, d0)
        w1 = codec.interleave(a1, b1, c1, d1)
        w2 = codec.interleave(a2, b2, c2, d2)
        w3 = codec.interleave(a3, b3, c3, d3)
    offset = outer * outer_stride + (group * 8).to(tl.int64) * row_stride + column
    statistics = None
    for lane in tl.static_range(8):
        if ENCODING.rounding == STOCHASTIC:
            if lane // 2 == 0:
                word = w0
            elif lane // 2 == 1:
                word = w1
            elif lane // 2 == 2:
                word = w2
            else:
                word = w3
            draw = word << 16 if lane % 2 == 0 else word & 0xFFFF0000
        x = load_fp32(x_ptr + offset, mask)
        values = None if values_ptr is None else values_ptr + offset
        codes = None if codes_ptr is None else codes_ptr + offset
        code = round_elements(x, draw, values, codes, mask, ENCODING)
        if stats_ptr is not None:
            more = statistics_of(x, code, ENCODING)
            statistics = more if lane == 0 else joined_statistics(statistics, more)
        offset += row_stride
    if stats_ptr is not None:
        add_statistics(stats_ptr, statistics)


@triton.jit
def _offset(index, n1, n2, n3, s0, s1, s2, s3):
    outer = index // n3
    middle = outer // n2
    return (middle // n1) * s0 + (middle % n1) * s1 + (outer % n2) * s2 + (index % n3) * s3


@triton.jit(do_not_specialize=RANDOM_WORDS)
def round_strided(
    x_ptr,
    values_ptr,
    codes_ptr,
    stats_ptr,
    count,
    n1,
    n2,
    n3,
    x_strides,
    values_strides,
    codes_strides,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any strides of up to four dimensions (sizes [any, n1, n2, n3]), one Philox block an element."""
    words = RandomWords(seed0, seed1, stream0, stream1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    x = load_fp32(x_ptr + _offset(index, n1, n2, n3, x_strides[0], x_strides[1], x_strides[2], x_strides[3]), mask)
    draw = index
    if ENCODING.rounding == STOCHASTIC:
        draw = codec.draw_of_index(index, words)
    values = None
    if values_ptr is not None:
        s = values_strides
        values = values_ptr + _offset(index, n1, n2, n3, s[0], s[1], s[2], s[3])
    codes = None
    if codes_ptr is not None:
        s = codes_strides
        codes = codes_ptr + _offset(index, n1, n2, n3, s[0], s[1], s[2], s[3])
    code = round_elements(x, draw, values, codes, mask, ENCODING)
    if stats_ptr is not None:
        add_statistics(stats_ptr, statistics_of(x, code, ENCODING))


@triton.jit(do_not_specialize=RANDOM_WORDS)
def round_transpose(
    x_ptr,
    codes_ptr,
    transposed_ptr,
    stats_ptr,
    rows,
    columns,
    x_stride,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of [batch, rows, columns]: read once, codes written as they are and as [batch, columns, rows]."""
    words = RandomWords(seed0, seed1, stream0, stream1)
    round_tile(
        x_ptr,
        codes_ptr,
        transposed_ptr,
        stats_ptr,
        rows,
        columns,
        x_stride,
        tl.program_id(2).to(tl.int64),
        tl.program_id(0),
        tl.program_id(1),
        words,
        ENCODING,
        WHOLE_GROUPS,
        PACKED,
        ROWS,
        COLUMNS,
    )


@triton.jit
def round_tile(
    x_ptr,
    codes_ptr,
    transposed_ptr,
    stats_ptr,
    rows,
    columns,
    x_stride,
    batch,
    tile_row,
    tile_column,
    words,
    ENCODING: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Round a tile and write its codes in both layouts.

    WHOLE_GROUPS: columns % 8 == 0, so a Philox block covers eight neighbours in a row and a thread uses all its words.
    PACKED: how many rows' codes of a column `transposed_ptr` takes as one integer; divides rows.
    """
    row = tile_row * ROWS + PACKED * tl.arange(0, ROWS // PACKED)[:, None]
    first_column = tile_column * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    offset = (batch * rows + row) * x_stride + column
    index = (batch * rows + row) * columns + column
    block = (batch * rows + row) * (columns // 8) + first_column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    packed = tl.zeros([ROWS // PACKED, COLUMNS], tl.uint32)
    statistics = None
    for lane in tl.static_range(PACKED):
        x = load_fp32(x_ptr + offset, mask)
        draw = index
        if ENCODING.rounding == STOCHASTIC:
            if WHOLE_GROUPS:
                w0, w1, w2, w3 = codec.words_of_blocks(block, words)
                draw = tl.reshape(codec.draws_of_words(w0, w1, w2, w3), [ROWS // PACKED, COLUMNS])
            else:
                draw = codec.draw_of_index(index, words)
        code = codec.encode(x, draw, ENCODING)
        tl.store(codes_ptr + index, code.to(codes_ptr.dtype.element_ty), mask=mask)
        packed |= code << (lane * (1 + ENCODING.exponent_bits + ENCODING.mantissa_bits))
        if stats_ptr is not None:
            more = statistics_of(x, code, ENCODING)
            statistics = more if lane == 0 else joined_statistics(statistics, more)
        offset += x_stride
        index += columns
        block += columns // 8
    word = tile_row * (ROWS // PACKED) + tl.arange(0, ROWS // PACKED)[None, :]
    words_a_column = rows // PACKED
    place = (batch * columns + tl.trans(column)) * words_a_column + word
    transposed = tl.trans(packed).to(transposed_ptr.dtype.element_ty)
    tl.store(transposed_ptr + place, transposed, (tl.trans(column) < columns) & (word < words_a_column))
    if stats_ptr is not None:
        add_statistics(stats_ptr, statistics)

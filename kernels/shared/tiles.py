"""Device functions that matrix products and convolutions share: operands, accumulation, epilogue.

Operands come as FP8, FP16 or BF16 tensors. Nothing here may round an operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import STOCHASTIC

# How products accumulate (recipe: `accumulate`).
FP16_MMA = tl.constexpr(1)  # operands decoded to FP16, FP16 instructions with FP32 accumulation
UNPROMOTED = tl.constexpr(2)  # native FP8 instructions alone: on sm_90 about 14 bits; for measurements only
EXACT = tl.constexpr(3)  # operands decoded to FP32, in the interpreter
PROMOTED_FMA = tl.constexpr(4)  # PROMOTED where Triton cannot promote
PROMOTED = tl.constexpr(128)  # native FP8 instructions; on sm_90 partial sums of so many are added in FP32
# 32 and 64 promote more often; for measurements only.


@triton.jit
def to_fp32(x):
    """FP8, FP16 or BF16 values as FP32, on bits: the interpreter decodes FP8 infinities and NaNs wrongly."""
    if x.dtype == tl.float8e5:
        return codec.decode(x.to(tl.uint8, bitcast=True).to(tl.uint32), codec.e5m2())
    if x.dtype == tl.float8e4nv:
        return codec.decode(x.to(tl.uint8, bitcast=True).to(tl.uint32), codec.e4m3())
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def multiply_add(a, b, accumulator, ACCUMULATE: tl.constexpr):
    """accumulator + a @ b for one step of at least 128 (FP8) along the summed dimension."""
    if ACCUMULATE == EXACT:
        # The interpreter's tl.dot multiplies wrongly decoded FP8 and raw BF16 bits, so it gets FP32.
        accumulator = tl.dot(to_fp32(a), to_fp32(b), accumulator, input_precision="ieee")
    elif a.dtype.primitive_bitwidth == 16 or ACCUMULATE == UNPROMOTED:
        accumulator = tl.dot(a, b, accumulator)
    elif ACCUMULATE == FP16_MMA:
        accumulator = tl.dot(a.to(tl.float16), b.to(tl.float16), accumulator)
    elif ACCUMULATE == PROMOTED_FMA:
        # An addition would be folded back into the product's own accumulator.
        accumulator = tl.fma(tl.dot(a, b), 1.0, accumulator)
    else:
        accumulator = tl.dot(a, b, accumulator, max_num_imprecise_acc=ACCUMULATE)
    return accumulator


@triton.jit
def groups_of_row(rows, first, WIDTH: tl.constexpr):
    """The Philox blocks of a tile [M, WIDTH], each of which serves eight neighbours in a row; all numbers are multiples
    of 8.

    Args:
        rows: int64 [M, 1], how the first elements of the whole rows count.
        first: the tile's first column.
    """
    return (rows >> 3) + (first // 8 + tl.arange(0, WIDTH // 8))[None, :]


@triton.jit
def uniform_of_tile(row, first, words, WHOLE_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """16 random bits on top of a uint32 for each element of a tile [ROWS, BLOCK].

    Args:
        row: int64 [ROWS, 1], how the tensor's elements count where the tile's rows begin, at column 0.
        first: the tile's first column.
        WHOLE_GROUPS: all of these are multiples of 8.
    """
    if WHOLE_GROUPS:
        w0, w1, w2, w3 = codec.words_of_blocks(groups_of_row(row, first, BLOCK), words)
        draw = tl.reshape(codec.draws_of_words(w0, w1, w2, w3), [row.shape[0], BLOCK])
    else:
        draw = codec.draw_of_index(row + (first + tl.arange(0, BLOCK))[None, :], words)
    return draw


@triton.jit
def draws_of_tile(row, first, words, ENCODING: tl.constexpr, WHOLE_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """What `codec.encode` takes as draws for a tile, see `uniform_of_tile`; of no use where nothing is drawn."""
    draw = row
    if ENCODING.rounding == STOCHASTIC:
        draw = uniform_of_tile(row, first, words, WHOLE_GROUPS, BLOCK)
    return draw


@triton.jit
def rounded_tile(x, row, first, words, ENCODING: tl.constexpr, WHOLE_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's values rounded once, as FP32; see `uniform_of_tile`."""
    if ENCODING.mantissa_bits < 23:
        draw = draws_of_tile(row, first, words, ENCODING, WHOLE_GROUPS, BLOCK)
        x = codec.decode(codec.encode(x, draw, ENCODING), ENCODING)
    return x


@triton.jit
def store_rounded(
    pointers,
    result,
    index,
    groups,
    mask,
    words,
    ENCODING: tl.constexpr,
):
    """Store an FP32 tile as it is, or rounded once: a format's FP32 values, or where pointers are of bytes its codes.

    `index`: how the tile's elements count.
    `groups`: `groups_of_row` where eight neighbours draw from one Philox block, else None.
    """
    if ENCODING.mantissa_bits == 23:
        tl.store(pointers, result, mask=mask)
    else:
        draw = index
        if ENCODING.rounding == STOCHASTIC:
            if groups is None:
                draw = codec.draw_of_index(index, words)
            else:
                w0, w1, w2, w3 = codec.words_of_blocks(groups, words)
                draw = tl.reshape(codec.draws_of_words(w0, w1, w2, w3), result.shape)
        code = codec.encode(result, draw, ENCODING)
        if pointers.dtype.element_ty.primitive_bitwidth == 8:
            tl.store(pointers, code.to(tl.uint8), mask=mask)
        else:
            tl.store(pointers, codec.decode(code, ENCODING), mask=mask)

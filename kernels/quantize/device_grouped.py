"""Triton kernels that round many tensors in one launch: a table of addresses stands for the tensors.

The bytes are those of the kernels for single tensors (device.py), whose rounding this is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.quantize.device import load_fp32, round_elements, round_tile
from fp8repro.kernels.shared.codec import STOCHASTIC
from fp8repro.kernels.shared.tables import draws_of_block, tensor_at, words_of

# Columns of the table of tensors (int64).
X = tl.constexpr(0)
CODES = tl.constexpr(1)
TRANSPOSED = tl.constexpr(2)
STREAM = tl.constexpr(3)  # where in device memory it lies, as one integer
COUNT = tl.constexpr(4)
MATRIX = tl.constexpr(5)  # rows and columns: of a matrix, or see `tables.draws_of_block`
COLUMNS = tl.constexpr(7)


@triton.jit
def _words(row, seed0, seed1, ENCODING: tl.constexpr):
    stream = tl.cast(0, tl.int64)
    if ENCODING.rounding == STOCHASTIC:
        stream = tl.load(tl.load(row + STREAM).to(tl.pointer_type(tl.int64)))
    return words_of(stream, seed0, seed1)


@triton.jit(do_not_specialize=["seed0", "seed1"])
def round_group(
    table,
    chunks,
    seed0,
    seed1,
    X_TYPE: tl.constexpr,
    CODE_TYPE: tl.constexpr,
    ENCODING: tl.constexpr,
    PERMUTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of a dense tensor, whose codes lie as it does.

    WHOLE: the number of elements is a multiple of 16, so that threads store vectors.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * chunk) * COLUMNS
    first = tl.load(chunks + 2 * chunk + 1) * BLOCK
    # Eight elements a thread, as in `device.round_flat`.
    local = tl.max_contiguous(tl.arange(0, BLOCK), 8)
    left = tl.minimum(tl.load(row + COUNT) - first, BLOCK).to(tl.int32)
    mask = local < (tl.multiple_of(left, 16) if WHOLE else left)
    x = load_fp32(tensor_at(row, X, X_TYPE, ALIGNED) + first + local, mask)
    draw = local
    if ENCODING.rounding == STOCHASTIC:
        words = _words(row, seed0, seed1, ENCODING)
        draw = draws_of_block(words, first, first + local, row + MATRIX, PERMUTED, BLOCK)
    round_elements(x, draw, None, tensor_at(row, CODES, CODE_TYPE, ALIGNED) + first + local, mask, ENCODING)


@triton.jit(do_not_specialize=["seed0", "seed1"])
def round_group_transposed(
    table,
    tiles,
    seed0,
    seed1,
    X_TYPE: tl.constexpr,
    ENCODING: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One tile of a contiguous matrix: its FP8 codes in both layouts."""
    tile = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + 2 * tile) * COLUMNS
    rows = tl.multiple_of(tl.load(row + MATRIX).to(tl.int32), PACKED)
    columns = tl.load(row + MATRIX + 1).to(tl.int32)
    if WHOLE_GROUPS:
        columns = tl.multiple_of(columns, 8)
    number = tl.load(tiles + 2 * tile + 1).to(tl.int32)
    across = tl.cdiv(columns, TILE_COLUMNS)
    if PACKED == 4:
        transposed = tensor_at(row, TRANSPOSED, tl.int32, ALIGNED)
    else:
        transposed = tensor_at(row, TRANSPOSED, tl.uint8, ALIGNED)
    round_tile(
        tensor_at(row, X, X_TYPE, ALIGNED),
        tensor_at(row, CODES, tl.uint8, ALIGNED),
        transposed,
        None,
        rows,
        columns,
        columns,
        tl.cast(0, tl.int64),
        number // across,
        number % across,
        _words(row, seed0, seed1, ENCODING),
        ENCODING,
        WHOLE_GROUPS,
        PACKED,
        TILE_ROWS,
        TILE_COLUMNS,
    )

"""Triton kernel of the matrix product: [batch, M, K] x [batch, K, N] in any layout, persistent over output tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared.codec import RANDOM_WORDS, RandomWords
from fp8repro.kernels.shared.tiles import groups_of_row, multiply_add, store_rounded


@triton.jit(do_not_specialize=[*RANDOM_WORDS, "inverse_scale"])
def multiply(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    inverse_scale,
    batches,
    M,
    N,
    K,
    chunk,
    a_strides,
    b_strides,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
):
    """c[batch, split, M, N] = a @ b * inverse_scale + bias, where a split sums `chunk` of K; c is contiguous.

    TMA: a_ptr and b_ptr are descriptors of [batch, M, K] and [batch, N, K], whose blocks hold zeros beyond the ends;
    strides and EVEN_K are not read. WHOLE_GROUPS: N is a multiple of 8.

    With two HALVES a program computes two tiles side by side from the same rows of a. That halves the traffic of a,
    and promoted sums need registers for one tile at a time, where one tile of twice the width would spill.
    """
    words = RandomWords(seed0, seed1, stream0, stream1)
    a_batch, a_row, a_column = a_strides
    b_batch, b_row, b_column = b_strides
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN * HALVES)
    tiles = tiles_m * tiles_n
    for work in range(tl.program_id(0), tiles * batches * SPLITS, tl.num_programs(0)):
        plane = work // tiles
        batch = (plane // SPLITS).to(tl.int64)
        start = (plane % SPLITS) * chunk
        # Tiles in bands of GROUP rows, so that neighbours share operands in the L2 cache.
        tile = work % tiles
        band = tile // (GROUP * tiles_n)
        band_rows = tl.minimum(tiles_m - band * GROUP, GROUP)
        tile_m = band * GROUP + tile % (GROUP * tiles_n) % band_rows
        tile_n = tile % (GROUP * tiles_n) // band_rows

        m = tile_m * BM + tl.arange(0, BM)
        n = tile_n * (BN * HALVES) + tl.arange(0, BN)
        k = tl.arange(0, BK)
        length = tl.minimum(chunk, K - start)
        if not TMA:
            # Rows beyond the end are read from the start instead and not stored: no mask in the loop.
            a_rows = a_ptr + batch * a_batch + (m % M).to(tl.int64)[:, None] * a_row
            b_plane = b_ptr + batch * b_batch
            b_columns = b_plane + (n % N).to(tl.int64)[None, :] * b_column
            a = a_rows + (start + k).to(tl.int64)[None, :] * a_column
            b = b_columns + (start + k).to(tl.int64)[:, None] * b_row
            if HALVES == 2:
                b2 = b_plane + ((n + BN) % N).to(tl.int64)[None, :] * b_column
                b2 += (start + k).to(tl.int64)[:, None] * b_row
        accumulator = tl.zeros((BM, BN), dtype=tl.float32)
        if HALVES == 2:
            accumulator2 = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(0, tl.cdiv(length, BK)):
            if TMA:
                at = start + step * BK
                a_tile = a_ptr.load([plane // SPLITS, tile_m * BM, at]).reshape(BM, BK)
                b_tile = b_ptr.load([plane // SPLITS, tile_n * (BN * HALVES), at]).reshape(BN, BK).T
            elif EVEN_K:
                a_tile = tl.load(a)
                b_tile = tl.load(b)
            else:
                left = length - step * BK
                a_tile = tl.load(a, mask=k[None, :] < left, other=0.0)
                b_tile = tl.load(b, mask=k[:, None] < left, other=0.0)
            accumulator = multiply_add(a_tile, b_tile, accumulator, ACCUMULATE)
            if HALVES == 2:
                if TMA:
                    b_tile = b_ptr.load([plane // SPLITS, tile_n * (BN * HALVES) + BN, at]).reshape(BN, BK).T
                else:
                    b_tile = tl.load(b2) if EVEN_K else tl.load(b2, mask=k[:, None] < left, other=0.0)
                    b2 += BK * b_row
                accumulator2 = multiply_add(a_tile, b_tile, accumulator2, ACCUMULATE)
            if not TMA:
                a += BK * a_column
                b += BK * b_row

        for half in tl.static_range(HALVES):
            result = accumulator * inverse_scale if half == 0 else accumulator2 * inverse_scale
            if bias_ptr is not None:
                result += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
            row = (plane.to(tl.int64) * M + m[:, None]) * N
            index = row + n[None, :]
            groups = None
            if WHOLE_GROUPS:
                groups = groups_of_row(row, tile_n * (BN * HALVES) + half * BN, BN)
            mask = (m[:, None] < M) & (n[None, :] < N)
            if TMA:
                # 64 bits up to the tile's first row; 32 bits from there on save registers.
                rows = c_ptr + (plane.to(tl.int64) * M + tile_m * BM) * N
                place = rows + (tl.arange(0, BM)[:, None] * N + n[None, :])
            else:
                place = c_ptr + index
            store_rounded(place, result, index, groups, mask, words, ENCODING)
            n += BN


@triton.jit
def transpose(x_ptr, y_ptr, rows, columns, x_strides, y_strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y[batch, columns, rows] = x[batch, rows, columns] transposed, of bytes; last dimensions are contiguous."""
    x_batch, x_row = x_strides
    y_batch, y_row = y_strides
    across = tl.cdiv(columns, COLUMNS)
    down = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    batch = (tile // across // down).to(tl.int64)
    row = (tile // across % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + batch * x_batch + row * x_row + column, mask=mask)
    tl.store(y_ptr + batch * y_batch + tl.trans(column) * y_row + tl.trans(row), tl.trans(x), mask=tl.trans(mask))

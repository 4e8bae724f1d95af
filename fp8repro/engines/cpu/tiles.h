// The micro-kernel of products without matrix tiles (amx.h): up to 6 rows and 64 columns, in FP32 registers from first
// to last term.
#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr int TILE_ROWS = 6, TILE_VECTORS = 4, TILE_COLUMNS = 16 * TILE_VECTORS;
constexpr int MOST_ROWS = 32;  // of the kernel in amx.h

// A stretch of consecutive terms: byte offsets of its first pair in both operands.
struct Stretch {
    int64_t a, b;
};

// Where a tile's terms lie. A term is a pair of BF16 values (32 bits) of each operand.
struct Terms {
    const Stretch* stretches;
    int64_t count;           // stretches
    int64_t length;          // pairs in a stretch
    int64_t a_step, b_step;  // bytes from pair to pair; amx.h: `a_step` from block to block
};

// A tile of the result.
struct Tile {
    const char* a[MOST_ROWS];  // first pair of each row
    const char* b;             // first pair of the first column; columns are 4 bytes apart
    float* out[MOST_ROWS];     // rows of the result
    int64_t row_step;          // amx.h only: bytes from row to row of `a`, within 16 of them; 0 where they lie anyhow
    int rows, columns;
    const float* bias;  // of the columns, or null
    bool add;           // to what `out` holds
};

// One vector of a row of sums, with the bias, to the result.
static inline void store_sums(const Tile& tile, int row, int vector, bool last, __m512 sums) {
    const __mmask16 some = last ? (__mmask16)((1u << (tile.columns - 16 * vector)) - 1) : (__mmask16)~0;
    float* out = tile.out[row] + 16 * vector;
    if (tile.bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(some, tile.bias + 16 * vector));
    if (tile.add) sums = _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), sums);
    _mm512_mask_storeu_ps(out, some, sums);
}

template <int ROWS, int VECTORS>
static void multiply_tile(const Tile& tile, const Terms& terms) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_setzero_ps();
    for (int64_t s = 0; s < terms.count; ++s) {
        const char* b = tile.b + terms.stretches[s].b;
        const char* a[ROWS];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) a[i] = tile.a[i] + terms.stretches[s].a;
        int64_t at = 0;
        for (int64_t k = 0; k < terms.length; ++k, at += terms.a_step, b += terms.b_step) {
            __m512bh column[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + 64 * v);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i) {
                const __m512bh row = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(a[i] + at));
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], row, column[v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) store_sums(tile, i, v, v + 1 == VECTORS, sum[i][v]);
}

template <int VECTORS>
static void multiply_rows(const Tile& tile, const Terms& terms) {
    switch (tile.rows) {
        case 1: return multiply_tile<1, VECTORS>(tile, terms);
        case 2: return multiply_tile<2, VECTORS>(tile, terms);
        case 3: return multiply_tile<3, VECTORS>(tile, terms);
        case 4: return multiply_tile<4, VECTORS>(tile, terms);
        case 5: return multiply_tile<5, VECTORS>(tile, terms);
        default: return multiply_tile<6, VECTORS>(tile, terms);
    }
}

static inline void multiply(const Tile& tile, const Terms& terms) {
    switch ((tile.columns + 15) / 16) {
        case 1: return multiply_rows<1>(tile, terms);
        case 2: return multiply_rows<2>(tile, terms);
        case 3: return multiply_rows<3>(tile, terms);
        default: return multiply_rows<4>(tile, terms);
    }
}

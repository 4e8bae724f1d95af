// The micro-kernel of every product: a tile of up to 6 rows and 64 columns, in FP32 registers from first to last term.
#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr int TILE_ROWS = 6, TILE_VECTORS = 4, TILE_COLUMNS = 16 * TILE_VECTORS;

// A stretch of consecutive terms: byte offsets of its first pair in both operands.
struct Stretch {
    int64_t a, b;
};

// Where a tile's terms lie. A term is a pair of BF16 values (32 bits) of each operand.
struct Terms {
    const Stretch* stretches;
    int64_t count;           // stretches
    int64_t length;          // pairs in a stretch
    int64_t a_step, b_step;  // bytes from pair to pair
};

// A tile of the result.
struct Tile {
    const char* a[TILE_ROWS];  // first pair of each row
    const char* b;             // first pair of the first column; columns are 4 bytes apart
    float* out[TILE_ROWS];     // rows of the result
    int rows, columns;
    const float* bias;  // of the columns, or null
    bool add;           // to what `out` holds
};

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
    const int last = tile.columns - 16 * (VECTORS - 1);
    const __mmask16 mask = (__mmask16)((1u << last) - 1);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        const __mmask16 some = v + 1 < VECTORS ? (__mmask16)~0 : mask;
        const __m512 bias = tile.bias ? _mm512_maskz_loadu_ps(some, tile.bias + 16 * v) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            float* out = tile.out[i] + 16 * v;
            __m512 result = tile.bias ? _mm512_add_ps(sum[i][v], bias) : sum[i][v];
            if (tile.add) result = _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), result);
            _mm512_mask_storeu_ps(out, some, result);
        }
    }
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

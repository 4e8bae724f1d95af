// The micro-kernel of tiles.h on CPUs with matrix tiles (AMX): 32 rows and 64 columns, 32 terms an instruction.
//
// Operands differ from tiles.h in one thing: the pairs of a row come in blocks of 16, zeros at the end, so that 16 rows
// of a block fill a register. What this kernel gives does not depend on the threads either.
#pragma once

#include "tiles.h"

constexpr int BLOCK_PAIRS = 16, BLOCK_BYTES = 4 * BLOCK_PAIRS, BLOCK_ROWS = 16;
static_assert(MOST_ROWS == 2 * BLOCK_ROWS, "two registers of rows");

#if defined(__AMX_BF16__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

// Linux asks a process to request the tiles' registers: they are large.
static bool request_blocks() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// While it lives, this thread has 8 tile registers of 16 rows and 64 bytes.
class Blocks {
  public:
    Blocks() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.bytes[i] = BLOCK_BYTES, config.rows[i] = BLOCK_ROWS;
        _tile_loadconfig(&config);
    }
    ~Blocks() { _tile_release(); }
};

// Some blocks of rows and vectors of columns of a tile. Registers 0 to 3 hold the sums, row by row.
template <int ROW_BLOCKS, int VECTORS>
static void multiply_blocks_of(const Tile& tile, const Terms& terms, int first_row, int first_vector) {
    constexpr bool TALL = ROW_BLOCKS == 2;
    static_assert(ROW_BLOCKS * VECTORS <= 4, "four registers of sums");
    const int rows = tile.rows - first_row < ROW_BLOCKS * BLOCK_ROWS ? tile.rows - first_row : ROW_BLOCKS * BLOCK_ROWS;
    // Rows at unequal distances are gathered; missing ones repeat another, and their sums are not stored.
    alignas(64) char gathered[BLOCK_ROWS * BLOCK_BYTES];
    alignas(64) float sums[ROW_BLOCKS * BLOCK_ROWS][16 * VECTORS];
    _tile_zero(0);
    if (TALL || VECTORS > 1) _tile_zero(1);
    if (TALL || VECTORS > 2) _tile_zero(2);
    if (TALL || VECTORS > 3) _tile_zero(3);
    const int64_t b_row = terms.b_step;
    for (int64_t s = 0; s < terms.count; ++s) {
        const char* b = tile.b + terms.stretches[s].b + 64 * first_vector;
        int64_t at = terms.stretches[s].a;
        for (int64_t k = 0; k < terms.length; k += BLOCK_PAIRS, at += terms.a_step, b += BLOCK_PAIRS * b_row) {
            if (TALL || tile.row_step) {
                _tile_loadd(4, tile.a[first_row] + at, tile.row_step);
            } else {
                for (int r = 0; r < BLOCK_ROWS; ++r) {
                    const char* row = tile.a[first_row + (r < rows ? r : 0)] + at;
                    _mm512_store_si512(gathered + r * BLOCK_BYTES, _mm512_loadu_si512(row));
                }
                _tile_loadd(4, gathered, BLOCK_BYTES);
            }
            _tile_loadd(6, b, b_row);
            if (TALL) {
                _tile_loadd(5, tile.a[BLOCK_ROWS] + at, tile.row_step);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(2, 5, 6);
                if (VECTORS > 1) {
                    _tile_loadd(7, b + 64, b_row);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
                continue;
            }
            _tile_dpbf16ps(0, 4, 6);
            if (VECTORS > 1) {
                _tile_loadd(7, b + 64, b_row);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (VECTORS > 2) {
                _tile_loadd(5, b + 128, b_row);
                _tile_dpbf16ps(2, 4, 5);
            }
            if (VECTORS > 3) {
                _tile_loadd(6, b + 192, b_row);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
    }
    float* to = sums[0];
    constexpr int64_t step = sizeof sums[0];
    _tile_stored(0, to, step);
    if (VECTORS > 1) _tile_stored(1, to + 16, step);
    if (TALL) {
        _tile_stored(2, to + 256 * VECTORS, step);
        if (VECTORS > 1) _tile_stored(3, to + 256 * VECTORS + 16, step);
    } else {
        if (VECTORS > 2) _tile_stored(2, to + 32, step);
        if (VECTORS > 3) _tile_stored(3, to + 48, step);
    }
    const int last = (tile.columns - 1) / 16;
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < VECTORS; ++v) {
            const int vector = first_vector + v;
            store_sums(tile, first_row + r, vector, vector == last, _mm512_load_ps(sums[r] + 16 * v));
        }
    }
}

// Fewer loads a product where two blocks of rows lie evenly; each sum is the same either way.
static inline void multiply_blocks(const Tile& tile, const Terms& terms) {
    const int vectors = (tile.columns + 15) / 16;
    if (tile.rows > BLOCK_ROWS && tile.row_step) {
        for (int v = 0; v + 1 < vectors; v += 2) multiply_blocks_of<2, 2>(tile, terms, 0, v);
        if (vectors % 2) multiply_blocks_of<2, 1>(tile, terms, 0, vectors - 1);
        return;
    }
    for (int row = 0; row < tile.rows; row += BLOCK_ROWS) {
        switch (vectors) {
            case 1: multiply_blocks_of<1, 1>(tile, terms, row, 0); break;
            case 2: multiply_blocks_of<1, 2>(tile, terms, row, 0); break;
            case 3: multiply_blocks_of<1, 3>(tile, terms, row, 0); break;
            default: multiply_blocks_of<1, 4>(tile, terms, row, 0);
        }
    }
}

#else

static bool request_blocks() { return false; }
struct Blocks {};
static inline void multiply_blocks(const Tile&, const Terms&) {}

#endif

// Walks over tensors that round as they go: contiguous runs, and matrices whose logical order is the transposed one.
#pragma once

#include "rounding.h"

namespace {

int64_t bytes_of(int32_t type) { return type == FLOAT32 ? 4 : type == CODE8 ? 1 : 2; }

// ---- Elements that do not fill a vector ----

template <typename T, bool RANDOM, bool COUNT>
void partial(const Tensors& t, int64_t at_x, int64_t at_values, int64_t at_codes, int count, const uint32_t* draws,
             const Format& f, Counts& counts) {
    // Padding is zero: it rounds to zero and counts nothing.
    T x[LANES] = {};
    uint32_t padded_draws[LANES] = {};
    unsigned char values[4 * LANES], codes[2 * LANES];
    std::memcpy(x, (const T*)t.x + at_x, count * sizeof(T));
    if (RANDOM) std::memcpy(padded_draws, draws, count * sizeof(uint32_t));
    const Tensors buffers = {x, values, codes, t.x_type, t.values_type, t.codes_type, false, t.add};
    if (t.add) std::memcpy(values, (const float*)t.values + at_values, count * sizeof(float));
    U32 bits[1] = {load(x)};
    const U32 draw[1] = {unaligned<U32>(padded_draws)};
    round_block<RANDOM, COUNT, 1>(bits, draw, f, counts);
    store_block<1>(bits, buffers, 0, 0, 0, f);
    if (t.values_type != NONE) {
        const int64_t size = bytes_of(t.values_type);
        std::memcpy((char*)t.values + at_values * size, values, count * size);
    }
    if (t.codes_type != NONE) {
        const int64_t size = bytes_of(t.codes_type);
        std::memcpy((char*)t.codes + at_codes * size, codes, count * size);
    }
}

// ---- A contiguous run whose first element has logical index `index` ----

struct Random {
    const Key key;
    uint64_t stream;
    bool draws;  // false: toward zero, which is what a draw that is never under the fraction gives
};

constexpr int BLOCK = 4 * LANES;

template <typename T>
INLINE void load_block(const Tensors& t, int64_t at_x, U32 bits[4]) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) bits[k] = load((const T*)t.x + at_x + k * LANES);
}

// Whether every value lies in the format's set already: random bits cannot move it then.
INLINE bool exact(const U32 bits[4], const Format& f) {
    U32 moved{};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) moved |= (bits[k] & MAGNITUDE) ^ nearest(bits[k] & MAGNITUDE, f);
    return !any_above(moved, U32{});
}

// The blocks of a run whose index is a multiple of 4; all arguments by value, so that they stay in registers.
// EXACT: most blocks are expected to be, and those that are draw nothing.
template <typename T, bool RANDOM, bool COUNT, bool LOW, bool EXACT>
__attribute__((noinline)) void run_blocks(Tensors t, int64_t at_x, int64_t at_values, int64_t at_codes, int64_t blocks, uint64_t index,
                Random random, Format f, Counts& total) {
    Counts counts;
    U32 draws[4] = {splat(~0u), splat(~0u), splat(~0u), splat(~0u)};
    for (int64_t b = 0; b < blocks; ++b) {
        U32 bits[4];
        if (EXACT) load_block<T>(t, at_x + b * BLOCK, bits);
        if (RANDOM && random.draws && !(EXACT && exact(bits, f))) {
            philox_consecutive<LOW>(index / 4 + b * LANES, random.stream, random.key, draws);
        }
        if (!EXACT) load_block<T>(t, at_x + b * BLOCK, bits);
        round_block<RANDOM, COUNT, 4>(bits, draws, f, counts);
        store_block<4>(bits, t, at_values + b * BLOCK, at_codes + b * BLOCK, LANES, f);
    }
    if (t.stream) fence_streaming();
    if (COUNT) total.add(counts);
}

// The same in stretches of blocks, each as its first one is: errors that another layer has rounded need no random bits.
template <typename T, bool RANDOM, bool COUNT, bool LOW>
void run_stretches(const Tensors& t, int64_t at_x, int64_t at_values, int64_t at_codes, int64_t blocks, uint64_t index,
                   const Random& random, const Format& f, Counts& counts) {
    constexpr int64_t STRETCH = RANDOM ? 64 : INT64_MAX;
    for (int64_t b = 0; b < blocks; b += std::min(STRETCH, blocks - b)) {
        bool is_exact = false;
        if (RANDOM && random.draws) {
            U32 bits[4];
            load_block<T>(t, at_x + b * BLOCK, bits);
            is_exact = exact(bits, f);
        }
        const auto piece = is_exact ? run_blocks<T, RANDOM, COUNT, LOW, RANDOM> : run_blocks<T, RANDOM, COUNT, LOW, false>;
        piece(t, at_x + b * BLOCK, at_values + b * BLOCK, at_codes + b * BLOCK, std::min(STRETCH, blocks - b),
              index + b * BLOCK, random, f, counts);
    }
}

template <typename T, bool RANDOM, bool COUNT>
void run(const Tensors& t, int64_t at_x, int64_t at_values, int64_t at_codes, int64_t count, uint64_t index,
         const Random& random, const Format& f, Counts& counts) {
    U32 draws[4] = {splat(~0u), splat(~0u), splat(~0u), splat(~0u)};
    for (int64_t i = 0; i < count;) {
        const uint64_t at = index + i;
        const int skip = RANDOM ? (int)(at % 4) : 0;
        const int64_t blocks = skip == 0 ? (count - i) / BLOCK : 0;
        if (blocks > 0) {
            const bool low = !RANDOM || (at + count) >> 34 == 0;
            const auto piece = low ? run_stretches<T, RANDOM, COUNT, true> : run_stretches<T, RANDOM, COUNT, !RANDOM>;
            piece(t, at_x + i, at_values + i, at_codes + i, blocks, at, random, f, counts);
            i += blocks * BLOCK;
        } else {
            if (RANDOM && random.draws) philox_consecutive<false>(at / 4, random.stream, random.key, draws);
            const int some = (int)std::min<int64_t>(count - i, skip ? 4 - skip : LANES);
            partial<T, RANDOM, COUNT>(t, at_x + i, at_values + i, at_codes + i, some, (uint32_t*)draws + skip, f,
                                      counts);
            i += some;
        }
    }
}

// ---- A matrix stored [rows][columns] whose logical order is [columns][rows] ----

INLINE void prefetch(const void* tensor, int32_t type, int64_t position) {
    if (type != NONE) __builtin_prefetch((const char*)tensor + position * bytes_of(type), 1);
}

// `some` rows (up to 4) of up to LANES columns, the first at `position`; draws[r] belongs to row r.
// A tile that lies `ahead` elements further comes later: machines do not foresee that by themselves.
template <typename T, bool COUNT>
INLINE void tile(const Tensors& t, int64_t position, int64_t columns, int width, int some, int64_t ahead,
                 const U32 draws[4], const Format& f, Counts& counts) {
    for (int r = 0; r < some; ++r) {
        const int64_t later = position + r * columns + ahead;
        prefetch(t.x, t.x_type, later);
        if (t.values != t.x) prefetch(t.values, t.values_type, later);
        prefetch(t.codes, t.codes_type, later);
    }
    if (width == LANES && some == 4) {
        U32 bits[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) bits[r] = load((const T*)t.x + position + r * columns);
        round_block<true, COUNT, 4>(bits, draws, f, counts);
        store_block<4>(bits, t, position, position, columns, f);
        return;
    }
    for (int r = 0; r < some; ++r, position += columns) {
        if (width == LANES) {
            U32 bits[1] = {load((const T*)t.x + position)};
            round_block<true, COUNT, 1>(bits, draws + r, f, counts);
            store_block<1>(bits, t, position, position, columns, f);
        } else {
            partial<T, true, COUNT>(t, position, position, position, width, (uint32_t*)&draws[r], f, counts);
        }
    }
}

// Rows [first, last) of a matrix of `rows` rows; logical index of (row, column): base + column * rows + row.
// `first` is a multiple of 4; so is `base` where `rows` is.
template <typename T, bool COUNT>
void transposed(Tensors t, int64_t at, int64_t rows, int64_t columns, int64_t first, int64_t last, uint64_t base,
                Random random, Format f, Counts& total) {
    Counts counts;
    U64 offsets[2];  // logical distances between the columns of a tile, even lanes first
    for (int lane = 0; lane < LANES; ++lane) offsets[lane % 2][lane / 2] = lane * rows;
    if (rows % 4 == 0) {
        // Every column of a tile draws from one block, so tiles can follow each other as they lie in memory.
        offsets[0] >>= 2;
        offsets[1] >>= 2;
        for (int64_t row = first; row < last; row += 4) {
            for (int64_t column = 0; column < columns; column += LANES) {
                const uint64_t block = (base + column * rows + row) / 4;
                const U64 blocks[2] = {offsets[0] + block, offsets[1] + block};
                U32 draws[4];
                philox_gathered(blocks, random.stream, random.key, draws);
                const int width = (int)std::min<int64_t>(LANES, columns - column);
                tile<T, COUNT>(t, at + row * columns + column, columns, width, 4, 4 * columns, draws, f, counts);
            }
        }
        if (COUNT) total.add(counts);
        return;
    }
    const int64_t ahead = (last - first) * columns;
    for (int64_t column = 0; column < columns; column += LANES) {
        const int width = (int)std::min<int64_t>(LANES, columns - column);
        const uint64_t start = base + column * rows + first;
        U64 blocks[2] = {offsets[0] + start, offsets[1] + start};
        const U32 skip = (U32)((blocks[0] & 3) | ((blocks[1] & 3) << 32));
        blocks[0] >>= 2;
        blocks[1] >>= 2;
        // A column of a tile draws from one block or from two neighbouring ones.
        U32 words[8];
        philox_gathered(blocks, random.stream, random.key, words);
        for (int64_t row = first; row < last; row += 4) {
            const int some = (int)std::min<int64_t>(4, last - row);
            if (any_above(skip + (uint32_t)some, splat(4)) || row + some < last) {
                blocks[0] += 1;
                blocks[1] += 1;
                philox_gathered(blocks, random.stream, random.key, words + 4);
            }
            U32 draws[4] = {words[0], words[1], words[2], words[3]};
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                for (int s = 1; s < 4; ++s) draws[r] = choose(skip == (uint32_t)s, words[r + s], draws[r]);
            }
            for (int k = 0; k < 4; ++k) words[k] = words[k + 4];
            tile<T, COUNT>(t, at + row * columns + column, columns, width, some, ahead, draws, f, counts);
        }
    }
    if (COUNT) total.add(counts);
}

}  // namespace

// Walks over tensors that round as they go: contiguous runs, and matrices whose logical order is the transposed one.
#pragma once

#include "rounding.h"

namespace {

int64_t bytes_of(int32_t type) { return type == FLOAT32 ? 4 : type == CODE8 ? 1 : 2; }

// ---- Elements that do not fill a vector ----

template <typename T, bool RANDOM, bool COUNT>
void partial(const Tensors& t, int64_t at_x, int64_t at_values, int64_t at_codes, int count, U32 rests,
             const Format& f, Counts& counts) {
    // Padding is zero: it rounds to zero and counts nothing.
    T x[LANES] = {};
    unsigned char values[4 * LANES], codes[2 * LANES];
    std::memcpy(x, (const T*)t.x + at_x, count * sizeof(T));
    const Tensors buffers = {x, values, codes, t.x_type, t.values_type, t.codes_type, false, t.add};
    if (t.add) std::memcpy(values, (const float*)t.values + at_values, count * sizeof(float));
    U32 bits[1] = {load(x)};
    round_block<RANDOM, COUNT, 1>(bits, &rests, f, counts);
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

constexpr int PER_CALL = 8;                // elements of a Philox block
constexpr int BLOCK = PER_CALL * LANES;    // elements whose words are made at once: LANES Philox blocks
constexpr int HALF_BLOCK = BLOCK / 2;      // elements that are rounded at once
constexpr uint32_t NO_DRAW = ~0u;          // words of draws that are not under any threshold but the largest

template <typename T>
INLINE void load_half(const Tensors& t, int64_t at_x, U32 bits[4]) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) bits[k] = load((const T*)t.x + at_x + k * LANES);
}

// Whether every value lies in the format's set already: random bits cannot move it then.
template <typename T>
INLINE bool exact(const Tensors& t, int64_t at_x, const Format& f) {
    U32 moved{};
#pragma GCC unroll 2
    for (int half = 0; half < BLOCK; half += HALF_BLOCK) {
        U32 bits[4];
        load_half<T>(t, at_x + half, bits);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) moved |= (bits[k] & MAGNITUDE) ^ nearest(bits[k] & MAGNITUDE, f);
    }
    return !any_above(moved, U32{});
}

// The blocks of a run whose index is a multiple of 8; all arguments by value, so that they stay in registers.
// EXACT: most blocks are expected to be, and those that are draw nothing.
template <typename T, bool RANDOM, bool COUNT, bool LOW, bool EXACT>
__attribute__((noinline)) void run_blocks(Tensors t, int64_t at_x, int64_t at_values, int64_t at_codes, int64_t blocks, uint64_t index,
                Random random, Format f, Counts& total) {
    Counts counts;
    U32 words[4] = {splat(NO_DRAW), splat(NO_DRAW), splat(NO_DRAW), splat(NO_DRAW)};
    const U32 below = splat(f.half());
    for (int64_t b = 0; b < blocks; ++b) {
        if (RANDOM && random.draws && !(EXACT && exact<T>(t, at_x + b * BLOCK, f))) {
            philox_consecutive<LOW>(index / PER_CALL + b * LANES, random.stream, random.key, words);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const int64_t at = b * BLOCK + half * HALF_BLOCK;
            U32 bits[4], rests[4];
            load_half<T>(t, at_x + at, bits);
            if (RANDOM) {
                rests_of_words(words[2 * half], below, rests);
                rests_of_words(words[2 * half + 1], below, rests + 2);
            }
            round_block<RANDOM, COUNT, 4>(bits, rests, f, counts);
            store_block<4>(bits, t, at_values + at, at_codes + at, LANES, f);
        }
    }
    if (t.stream) fence_streaming();
    if (COUNT) total.add(counts);
}

// The same in stretches of blocks, each as its first one is: errors that another layer has rounded need no random bits.
template <typename T, bool RANDOM, bool COUNT, bool LOW>
void run_stretches(const Tensors& t, int64_t at_x, int64_t at_values, int64_t at_codes, int64_t blocks, uint64_t index,
                   const Random& random, const Format& f, Counts& counts) {
    constexpr int64_t STRETCH = RANDOM ? 32 : INT64_MAX;
    for (int64_t b = 0; b < blocks; b += std::min(STRETCH, blocks - b)) {
        const bool is_exact = RANDOM && random.draws && exact<T>(t, at_x + b * BLOCK, f);
        const auto piece = is_exact ? run_blocks<T, RANDOM, COUNT, LOW, RANDOM> : run_blocks<T, RANDOM, COUNT, LOW, false>;
        piece(t, at_x + b * BLOCK, at_values + b * BLOCK, at_codes + b * BLOCK, std::min(STRETCH, blocks - b),
              index + b * BLOCK, random, f, counts);
    }
}

// Up to BLOCK elements of a run, whose draws lie `skip` after a multiple of 8.
template <typename T, bool RANDOM, bool COUNT>
void run_piece(const Tensors& t, int64_t at_x, int64_t at_values, int64_t at_codes, int count, uint64_t index,
               const Random& random, const Format& f, Counts& counts) {
    U32 words[5] = {splat(NO_DRAW), splat(NO_DRAW), splat(NO_DRAW), splat(NO_DRAW), splat(NO_DRAW)};
    if (RANDOM && random.draws) {
        philox_consecutive<false>(index / PER_CALL, random.stream, random.key, words);
    }
    const uint16_t* halves = (const uint16_t*)words + index % PER_CALL;
    for (int i = 0; i < count; i += LANES) {
        U32 rest[1] = {};
        if (RANDOM) rest[0] = ~__builtin_convertvector(unaligned<U16>(halves + i), U32) << 16 | f.half();
        if (i + LANES <= count) {
            U32 bits[1] = {load((const T*)t.x + at_x + i)};
            round_block<RANDOM, COUNT, 1>(bits, rest, f, counts);
            store_block<1>(bits, t, at_values + i, at_codes + i, LANES, f);
        } else {
            partial<T, RANDOM, COUNT>(t, at_x + i, at_values + i, at_codes + i, count - i, rest[0], f, counts);
        }
    }
}

template <typename T, bool RANDOM, bool COUNT>
void run(const Tensors& t, int64_t at_x, int64_t at_values, int64_t at_codes, int64_t count, uint64_t index,
         const Random& random, const Format& f, Counts& counts) {
    for (int64_t i = 0; i < count;) {
        const uint64_t at = index + i;
        const int skip = RANDOM ? (int)(at % PER_CALL) : 0;
        const int64_t blocks = skip == 0 ? (count - i) / BLOCK : 0;
        if (blocks > 0) {
            const bool low = !RANDOM || (at + count) >> 35 == 0;
            const auto piece = low ? run_stretches<T, RANDOM, COUNT, true> : run_stretches<T, RANDOM, COUNT, !RANDOM>;
            piece(t, at_x + i, at_values + i, at_codes + i, blocks, at, random, f, counts);
            i += blocks * BLOCK;
        } else {
            // Up to the multiple of 8 where blocks begin, or what is left.
            const bool before = skip > 0 && count - i >= BLOCK + PER_CALL - skip;
            const int some = before ? PER_CALL - skip : (int)std::min<int64_t>(count - i, BLOCK - skip);
            run_piece<T, RANDOM, COUNT>(t, at_x + i, at_values + i, at_codes + i, some, at, random, f, counts);
            i += some;
        }
    }
}

// ---- A matrix stored [rows][columns] whose logical order is [columns][rows] ----

INLINE void prefetch(const void* tensor, int32_t type, int64_t position) {
    if (type != NONE) __builtin_prefetch((const char*)tensor + position * bytes_of(type), 1);
}

// Four rows of up to LANES columns, the first at `position`; rests[r] belongs to row r.
// A tile that lies `ahead` elements further comes later: machines do not foresee that by themselves.
template <typename T, bool COUNT>
INLINE void tile(const Tensors& t, int64_t position, int64_t columns, int width, int64_t ahead, const U32 rests[4],
                 const Format& f, Counts& counts) {
    for (int r = 0; r < 4; ++r) {
        const int64_t later = position + r * columns + ahead;
        prefetch(t.x, t.x_type, later);
        if (t.values != t.x) prefetch(t.values, t.values_type, later);
        prefetch(t.codes, t.codes_type, later);
    }
    if (width == LANES) {
        U32 bits[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) bits[r] = load((const T*)t.x + position + r * columns);
        round_block<true, COUNT, 4>(bits, rests, f, counts);
        store_block<4>(bits, t, position, position, columns, f);
        return;
    }
    for (int r = 0; r < 4; ++r, position += columns) {
        partial<T, true, COUNT>(t, position, position, position, width, rests[r], f, counts);
    }
}

// Rows [first, last) of a matrix of `rows` rows; logical index of (row, column): base + column * rows + row. All are
// multiples of 8, so that eight rows of a column draw from one Philox block.
template <typename T, bool COUNT>
void transposed(Tensors t, int64_t at, int64_t rows, int64_t columns, int64_t first, int64_t last, uint64_t base,
                Random random, Format f, Counts& total) {
    Counts counts;
    U64 offsets[2];  // distances between the blocks of a tile's columns, even lanes first
    for (int lane = 0; lane < LANES; ++lane) offsets[lane % 2][lane / 2] = lane * rows / PER_CALL;
    U32 words[4] = {splat(NO_DRAW), splat(NO_DRAW), splat(NO_DRAW), splat(NO_DRAW)};
    for (int64_t row = first; row < last; row += PER_CALL) {
        for (int64_t column = 0; column < columns; column += LANES) {
            const uint64_t block = (base + column * rows + row) / PER_CALL;
            const U64 blocks[2] = {offsets[0] + block, offsets[1] + block};
            if (random.draws) philox_gathered(blocks, random.stream, random.key, words);
            const int width = (int)std::min<int64_t>(LANES, columns - column);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                U32 rests[4];
                for (int k = 0; k < 2; ++k) {
                    rests[2 * k] = ~words[2 * half + k] << 16 | f.half();
                    rests[2 * k + 1] = (~words[2 * half + k] & 0xFFFF0000u) | f.half();
                }
                const int64_t position = at + (row + 4 * half) * columns + column;
                tile<T, COUNT>(t, position, columns, width, PER_CALL * columns, rests, f, counts);
            }
        }
    }
    if (COUNT) total.add(counts);
}

}  // namespace

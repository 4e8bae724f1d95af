// Philox-4x32-10 (Salmon et al., SC 2011), two vectors of counters at a time.
// Words live in the low halves of 64-bit lanes; the high halves hold what the multiplications left there.
#pragma once

#include "vectors.h"

struct Key {
    uint64_t first[10], second[10];  // the round keys, 32 bits each

    explicit Key(uint64_t seed) {
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            first[round] = k0;
            second[round] = k1;
        }
    }
};

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;

// Two groups of LANES / 2 blocks at once, because one alone leaves the machine waiting for its multiplications.
// In: block indices; `high` holds their high words. Out: words[k][group].
INLINE void philox(const U64 block[2], const U64 high[2], uint64_t stream, const Key& key, U64 words[4][2]) {
    U64 c0[2], c1[2], c2[2], c3[2];
    // In round 0 only the block differs between lanes, so half of the first two rounds is scalar.
    const uint64_t p1 = (uint64_t)PHILOX_M1 * (uint32_t)stream;
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
        const U64 p0 = multiply_low32(block[g], PHILOX_M0);
        c0[g] = high[g] ^ splat64((p1 >> 32) ^ key.first[0]);
        c1[g] = splat64(p1);
        c2[g] = (p0 >> 32) ^ splat64((stream >> 32) ^ key.second[0]);
        c3[g] = p0;
    }
#pragma GCC unroll 9
    for (int round = 1; round < 10; ++round) {
#pragma GCC unroll 2
        for (int g = 0; g < 2; ++g) {
            const U64 q0 = multiply_low32(c0[g], PHILOX_M0), q1 = multiply_low32(c2[g], PHILOX_M1);
            c0[g] = xor3(q1 >> 32, c1[g], splat64(key.first[round]));
            c2[g] = xor3(q0 >> 32, c3[g], splat64(key.second[round]));
            c1[g] = q1;
            c3[g] = q0;
        }
    }
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
        words[0][g] = c0[g];
        words[1][g] = c1[g];
        words[2][g] = c2[g];
        words[3][g] = c3[g];
    }
}

// The low halves of the lanes of two vectors in turns.
INLINE U64 pairs(U64 even, U64 odd) {
#if defined(FULL_WIDTH)
    return (U64)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#else
    return (even & splat64(0xFFFFFFFFull)) | (odd << 32);
#endif
}

// Words of LANES consecutive blocks in element order: four vectors. LOW: all block indices are under 2^32.
template <bool LOW>
INLINE void philox_consecutive(uint64_t first_block, uint64_t stream, const Key& key, U32 draws[4]) {
    constexpr int HALF = LANES / 2;
    U64 order;
    // Even lanes hold the first half of a group, odd ones the second: the interleaving below then stays within lanes.
    for (int lane = 0; lane < HALF; ++lane) order[lane] = lane / 2 + lane % 2 * (HALF / 2);
    const U64 block[2] = {splat64(first_block) + order, splat64(first_block + HALF) + order};
    const U64 high[2] = {LOW ? U64{} : block[0] >> 32, LOW ? U64{} : block[1] >> 32};
    U64 words[4][2];
    philox(block, high, stream, key, words);
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
        interleave(pairs(words[0][g], words[1][g]), pairs(words[2][g], words[3][g]), draws + 2 * g);
    }
}

// What the draws of 2 * LANES elements leave of 0xFFFF, on top of a lane each, above `half`; `words` follow each other.
INLINE void rests_of_words(U32 words, U32 half, U32 rests[2]) {
    words = ~words;
#if defined(FULL_WIDTH)
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES)));
    Halves place;
    for (int lane = 0; lane < 2 * LANES; ++lane) place[lane] = lane / 2;
    for (int k = 0; k < 2; ++k, place += LANES) {
        rests[k] = (U32)_mm512_mask_permutexvar_epi16((__m512i)half, 0xAAAAAAAAu, (__m512i)place, (__m512i)words);
    }
#else
    U16 halves[2];
    std::memcpy(halves, &words, sizeof words);
    for (int k = 0; k < 2; ++k) rests[k] = __builtin_convertvector(halves[k], U32) << 16 | half;
#endif
}

// The words of LANES arbitrary blocks, one block a lane, even lanes first: draws[k] holds word k.
INLINE void philox_gathered(const U64 blocks[2], uint64_t stream, const Key& key, U32 draws[4]) {
    const U64 high[2] = {blocks[0] >> 32, blocks[1] >> 32};
    U64 words[4][2];
    philox(blocks, high, stream, key, words);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) draws[k] = (U32)((words[k][0] & 0xFFFFFFFFull) | (words[k][1] << 32));
}

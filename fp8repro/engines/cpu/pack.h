// FP8 bytes to the BF16 layouts that `tiles.h` and `amx.h` multiply. Every value of an FP8 format is exact in BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// BF16 bits of the 128 magnitudes of a format, split into low and high bytes for table look-ups.
struct Decoder {
    __m512i low[2], high[2];

    explicit Decoder(const uint16_t magnitudes[128]) {
        alignas(64) uint8_t bytes[2][128];
        for (int i = 0; i < 128; ++i) {
            bytes[0][i] = (uint8_t)magnitudes[i];
            bytes[1][i] = (uint8_t)(magnitudes[i] >> 8);
        }
        for (int half = 0; half < 2; ++half) {
            low[half] = _mm512_load_si512(bytes[0] + 64 * half);
            high[half] = _mm512_load_si512(bytes[1] + 64 * half);
        }
    }

    // 64 codes to 64 BF16 values in order.
    void operator()(__m512i codes, __m512i out[2]) const {
        // Byte interleaving works within 128-bit lanes: spread the codes so that its results come out in order.
        codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);
        const __m512i l = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        const __m512i h = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8((char)0x80));
        out[0] = _mm512_unpacklo_epi8(l, _mm512_or_si512(h, sign));
        out[1] = _mm512_unpackhi_epi8(l, _mm512_or_si512(h, sign));
    }
};

static inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }
static inline __mmask32 first_words(int64_t count) { return count >= 32 ? ~0u : (1u << (count < 0 ? 0 : count)) - 1; }

// `count` codes in a row to BF16.
static inline void decode_row(const uint8_t* codes, int64_t count, uint16_t* out, const Decoder& decode) {
    for (int64_t i = 0; i < count; i += 64) {
        __m512i values[2];
        decode(_mm512_maskz_loadu_epi8(first_bytes(count - i), codes + i), values);
        _mm512_mask_storeu_epi16(out + i, first_words(count - i), values[0]);
        _mm512_mask_storeu_epi16(out + i + 32, first_words(count - i - 32), values[1]);
    }
}

// Two rows of `count` codes (a missing second one is zero) to pairs: out[i] = (second[i], first[i]) as 32 bits.
static inline void decode_pairs(const uint8_t* first, const uint8_t* second, int64_t count, uint32_t* out,
                                const Decoder& decode) {
    for (int64_t i = 0; i < count; i += 32) {
        const __mmask32 some = first_words(count - i);
        const __m256i a = _mm256_maskz_loadu_epi8(some, first + i);
        const __m256i b = second ? _mm256_maskz_loadu_epi8(some, second + i) : _mm256_setzero_si256();
        const __m512i wide_a = _mm512_cvtepu8_epi16(a), wide_b = _mm512_cvtepu8_epi16(b);
        __m512i values[2];
        decode(_mm512_or_si512(wide_a, _mm512_slli_epi16(wide_b, 8)), values);
        const int64_t left = count - i;
        _mm512_mask_storeu_epi32(out + i, (__mmask16)first_words(left < 16 ? left : 16), values[0]);
        _mm512_mask_storeu_epi32(out + i + 16, (__mmask16)first_words(left < 16 ? 0 : left < 32 ? left - 16 : 16),
                                 values[1]);
    }
}

// Up to 16 rows of `count` codes, `stride` apart, to columns of pairs: out[k * step + row] = codes (2k + 1, 2k).
static inline void decode_transposed(const uint8_t* codes, int64_t stride, int rows, int64_t count, uint32_t* out,
                                     int64_t step, const Decoder& decode) {
    constexpr int64_t CHUNK = 64;  // codes of a row that are transposed at a time
    uint16_t pairs[CHUNK / 2][16];
    for (int64_t k = 0; k < count; k += CHUNK) {
        const int64_t some = count - k < CHUNK ? count - k : CHUNK;
        std::memset(pairs, 0, sizeof pairs);
        for (int row = 0; row < rows; ++row) {
            alignas(64) uint16_t line[CHUNK / 2];
            _mm512_store_si512(line, _mm512_maskz_loadu_epi8(first_bytes(some), codes + row * stride + k));
            for (int64_t pair = 0; pair < (some + 1) / 2; ++pair) pairs[pair][row] = line[pair];
        }
        for (int64_t pair = 0; pair < (some + 1) / 2; pair += 2) {
            __m512i values[2];
            decode(_mm512_loadu_si512(pairs[pair]), values);
            _mm512_storeu_si512(out + (k / 2 + pair) * step, values[0]);
            if (pair + 1 < (some + 1) / 2) _mm512_storeu_si512(out + (k / 2 + pair + 1) * step, values[1]);
        }
    }
}

// 16 rows of 32-bit pairs, `step` pairs apart, to 16 rows of their columns.
static inline void transpose_pairs(const uint32_t* in, int64_t step, uint32_t* out) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * step);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // Then quarter q of r[4 i + j] holds column 4 q + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    constexpr int EVEN = 0x88, ODD = 0xdd;  // quarters 0 and 2, 1 and 3, of two registers
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], EVEN);
        const __m512i even_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], EVEN);
        const __m512i odd = _mm512_shuffle_i32x4(r[j], r[4 + j], ODD);
        const __m512i odd_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], ODD);
        _mm512_storeu_si512(out + 16 * j, _mm512_shuffle_i32x4(even, even_below, EVEN));
        _mm512_storeu_si512(out + 16 * (4 + j), _mm512_shuffle_i32x4(odd, odd_below, EVEN));
        _mm512_storeu_si512(out + 16 * (8 + j), _mm512_shuffle_i32x4(even, even_below, ODD));
        _mm512_storeu_si512(out + 16 * (12 + j), _mm512_shuffle_i32x4(odd, odd_below, ODD));
    }
}

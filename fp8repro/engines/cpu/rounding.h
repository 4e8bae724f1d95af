// Rounding of vectors: what `fp8repro/numerics/reference.py` defines, on the bits of |x| in FP32 (FP16 and BF16 are exact there).
// Blocks that hold only zeros and values in the format's normal range take a short path; others a rare, branching one.
#pragma once

#include "philox.h"

#include <algorithm>

enum Rounding : int32_t { NEAREST = 0, STOCHASTIC = 1, TOWARD_ZERO = 2 };
enum Type : int32_t { NONE = 0, FLOAT32 = 1, FLOAT16 = 2, BFLOAT16 = 3, CODE8 = 4, CODE16 = 5 };

constexpr uint32_t INFINITY32 = 0x7F800000u, MAGNITUDE = 0x7FFFFFFFu, SIGN = 0x80000000u;

// Mirrored by fp8repro/engines/cpu/__init__.py. Magnitudes are FP32 bit patterns.
struct Format {
    int32_t rounding;
    int32_t subnormal_nearest;
    int32_t drop;              // discarded significand bits of a normal value: 23 - mantissa_bits
    uint32_t smallest_normal;
    uint32_t largest;
    uint32_t beyond;    // what a finite value over the largest one becomes
    uint32_t infinity;  // what an infinite input becomes
    uint32_t nan_code;

    bool is_e5m2() const { return drop == 21 && smallest_normal == 0x38800000u; }
    // FP32's own exponent range: the bits of its subnormals round like those of any other value.
    bool is_wide() const { return smallest_normal == 0x800000u; }
    // Code of a normal value: (magnitude - rebias) >> drop.
    uint32_t rebias() const { return smallest_normal - 0x800000u; }
    // What stands under the 16 bits of a rest, see `round_block`.
    uint32_t half() const { return rounding == STOCHASTIC ? 0x8000 : 0; }
};

struct Tensors {
    const void* x;
    void* values;
    void* codes;
    int32_t x_type, values_type, codes_type;
    bool stream;      // write FP32 values around the caches
    bool add = false;  // add to the FP32 values that are there
};

struct Counts {
    U32 nonzero{}, survivors{}, overflow{}, absmax{};  // of finite inputs; survivors are not rounded to zero

    void add(const Counts& other) {
        nonzero += other.nonzero;
        survivors += other.survivors;
        overflow += other.overflow;
        absmax = maximum(absmax, other.absmax);
    }

    void add_to(double* stats) const {
        uint32_t largest = 0;
        for (int i = 0; i < LANES; ++i) {
            stats[0] += nonzero[i];
            stats[1] += nonzero[i] - survivors[i];
            stats[2] += overflow[i];
            largest = std::max<uint32_t>(largest, absmax[i]);
        }
        float magnitude;
        std::memcpy(&magnitude, &largest, sizeof magnitude);
        stats[3] = std::max(stats[3], (double)magnitude);
    }
};

// ---- Rounding of magnitudes ----

// FP32 power of two whose ulp is the format's quantum in the binade of `magnitude`: adding it rounds to nearest.
INLINE U32 nearest(U32 magnitude, const Format& f) {
    if (f.is_wide()) {
        const U32 odd = (magnitude >> f.drop) & 1;
        return (magnitude + ((1u << (f.drop - 1)) - 1) + odd) & (~0u << f.drop);
    }
    const U32 least = splat(f.smallest_normal);
    const U32 binade = choose(magnitude > least, magnitude, least) & INFINITY32;
    const F32 shifter = (F32)(binade + ((uint32_t)f.drop << 23));
    return (U32)(((F32)magnitude + shifter) - shifter);
}

// The same for what a subnormal result discards. `rest`: see `round_block`.
INLINE U32 subnormal_stochastic(U32 magnitude, U32 rest, const Format& f) {
    const uint32_t quantum = f.smallest_normal - ((23u - (uint32_t)f.drop) << 23);
    if (f.rounding == STOCHASTIC && f.drop >= 17) {
        // One addition to 128 quanta and a rest of steps of 2^-16, which is the sum's ulp: it rounds to the nearest
        // step, of two the even one, and the one that carries into the quanta is even.
        const uint32_t shifter = quantum + (7u << 23);
        const F32 sum = (F32)magnitude + (F32)(shifter + (rest >> 16));
        return (U32)((F32)((U32)sum & 0xFFFF0000u) - (F32)splat(shifter));
    }
    // More quanta than a sum with such an ulp can count: split them off.
    const F32 quanta = (F32)magnitude * (F32)splat((254u << 23) - quantum);
    U32 whole = (U32)__builtin_convertvector(quanta, I32);
    if (f.rounding == STOCHASTIC) {
        constexpr uint32_t SHIFTER = 0x43000000u;  // 128
        const F32 fraction = quanta - __builtin_convertvector((I32)whole, F32);
        whole += ((U32)(fraction + (F32)(SHIFTER + (rest >> 16))) - SHIFTER) >> 16;
    }
    return (U32)(__builtin_convertvector((I32)whole, F32) * (F32)splat(quantum));
}

INLINE U32 overflowed(U32 magnitude, U32 rounded, const Format& f) {
    const U32 finite = choose(rounded > f.largest, splat(f.beyond), rounded);
    const U32 special = choose(magnitude > INFINITY32, splat(MAGNITUDE), splat(f.infinity));
    return choose(magnitude >= INFINITY32, special, finite);
}

// ---- Blocks of N vectors ----

// x, bits of FP32 values in, bits of their rounded values out. rests: 0xFFFF - draw on top of each lane, `half` below.
// As many of their upper bits as a normal value discards carry if and only if draw < floor(fraction * 2^16 + 1/2);
// toward zero nothing may carry, which is what the largest draw over no half gives.
template <bool RANDOM, bool COUNT, int N>
INLINE void round_block(U32 x[N], const U32 rests[N], const Format& f, Counts& counts) {
    U32 magnitude[N], rounded[N];
    const uint32_t below_ulp = (1u << f.drop) - 1;
    U32 largest{}, smallest = splat(~0u);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        magnitude[k] = x[k] & MAGNITUDE;
        // Only a NaN carries into its sign, and is put right below.
        rounded[k] = RANDOM ? (x[k] + (rests[k] >> (32 - f.drop))) & ~below_ulp
                            : nearest(magnitude[k], f) | (x[k] & SIGN);
        largest = maximum(largest, magnitude[k]);
        smallest = minimum(smallest, magnitude[k] - 1);  // zero becomes the largest integer
    }
    if (RANDOM && any_above(splat(f.smallest_normal - 1), smallest) && (f.subnormal_nearest || !f.is_wide())) {
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) {
            const U32 small = f.subnormal_nearest ? nearest(magnitude[k], f)
                                                  : subnormal_stochastic(magnitude[k], rests[k], f);
            rounded[k] = choose(magnitude[k] < f.smallest_normal, small | (x[k] & SIGN), rounded[k]);
        }
    }
    const bool overflows = any_above(largest, splat(f.largest));
    if (__builtin_expect(overflows, 0)) {
        for (int k = 0; k < N; ++k) {
            rounded[k] = overflowed(magnitude[k], rounded[k] & MAGNITUDE, f) | (x[k] & SIGN);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        if (COUNT) {
            U32 finite = magnitude[k], survivor = rounded[k] & MAGNITUDE;
            if (overflows) {
                finite = choose(finite < INFINITY32, finite, U32{});
                survivor = choose(finite != 0, survivor, U32{});
                counts.overflow += choose(finite > f.largest, splat(1), U32{});
            }
            counts.nonzero += choose(finite != 0, splat(1), U32{});
            counts.survivors += choose(survivor != 0, splat(1), U32{});
            counts.absmax = maximum(counts.absmax, finite);
        }
        x[k] = rounded[k];
    }
}

INLINE U32 encoded(U32 bits, const Format& f) {
    const U32 magnitude = bits & MAGNITUDE;
    U32 code = (magnitude - f.rebias()) >> f.drop;
    if (!f.is_wide()) {
        // Of a subnormal the quanta are counted by the significand of a shifter whose ulp is one quantum.
        const uint32_t shifter = f.smallest_normal + ((uint32_t)f.drop << 23);
        const U32 subnormal = (U32)((F32)magnitude + (F32)splat(shifter)) - shifter;
        code = choose(magnitude < f.smallest_normal, subnormal, code);
    }
    if (__builtin_expect(any_above(magnitude, splat(f.largest)), 0)) {
        const uint32_t infinite = ((f.largest - f.rebias()) >> f.drop) + 1;
        code = choose(magnitude == INFINITY32, splat(infinite), code);
        code = choose(magnitude > INFINITY32, splat(f.nan_code), code);
    }
    const int sign_shift = f.nan_code > 0xFF ? 16 : 24;
    return code | ((bits & SIGN) >> sign_shift);
}

INLINE void store_code8(uint8_t* out, U32 bits, const Format& f) {
#if defined(FULL_WIDTH)
    if (f.is_e5m2()) {
        // The upper half of an FP16, to which the conversion is exact.
        const __m256i half = _mm512_cvtps_ph((__m512)bits, 0);
        _mm_storeu_si128((__m128i*)out, _mm256_cvtepi16_epi8(_mm256_srli_epi16(half, 8)));
        return;
    }
#endif
    store_low8(out, encoded(bits, f));
}

// Stores N vectors, `step` elements apart, where the tensors want them.
template <int N>
INLINE void store_block(U32 bits[N], const Tensors& t, int64_t at_values, int64_t at_codes, int64_t step,
                        const Format& f) {
    if (t.values_type == FLOAT32) {
        float* out = (float*)t.values + at_values;
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) {
            if (t.add) bits[k] = (U32)((F32)load(out + k * step) + (F32)bits[k]);
            t.stream ? store_streaming(out + k * step, bits[k]) : store(out + k * step, bits[k]);
        }
    } else if (t.values_type == BFLOAT16) {
        uint16_t* out = (uint16_t*)t.values + at_values;
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) {
            U32 top = bits[k];
            // Formats of up to 8 significand bits are exact in BF16; wider ones round once more, to nearest.
            if (f.drop < 16) top = choose((top & MAGNITUDE) > INFINITY32, top, top + 0x7FFF + ((top >> 16) & 1));
            store_low16(out + k * step, top >> 16);
        }
    }
    if (t.codes_type == CODE8) {
        uint8_t* out = (uint8_t*)t.codes + at_codes;
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) store_code8(out + k * step, bits[k], f);
    } else if (t.codes_type == CODE16) {
        uint16_t* out = (uint16_t*)t.codes + at_codes;
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) store_low16(out + k * step, encoded(bits[k], f));
    }
}

// One machine vector of 32-bit lanes at a time. The compiler's own vector types do the arithmetic on any machine;
// intrinsics appear only where those types cannot name the instruction. No rounding is decided here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// Wider vectors than the machine has would compile, slowly, to slow code.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FULL_WIDTH 1
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;

typedef uint32_t U32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(VECTOR_BYTES)));
typedef float F32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t U64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint8_t U8 __attribute__((vector_size(VECTOR_BYTES / 4)));    // as many lanes as U32
typedef uint16_t U16 __attribute__((vector_size(VECTOR_BYTES / 2)));  // as many lanes as U32

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

INLINE U32 splat(uint32_t value) { return U32{} + value; }
INLINE U64 splat64(uint64_t value) { return U64{} + value; }

template <typename To, typename From>
INLINE To unaligned(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// ---- Loading: values as the bits of their FP32 equals ----

INLINE U32 load(const float* x) { return unaligned<U32>(x); }

INLINE U32 load(const BFloat16* x) { return __builtin_convertvector(unaligned<U16>(x), U32) << 16; }

INLINE U32 half_to_float(U16 half) {
#if defined(FULL_WIDTH)
    return (U32)_mm512_cvtph_ps((__m256i)half);
#else
    const U32 wide = __builtin_convertvector(half, U32);
    const U32 magnitude = wide & 0x7FFF, sign = (wide & 0x8000) << 16;
    const U32 normal = (magnitude << 13) + (112u << 23);
    // Subnormals: the significand as an integer, times 2^-24.
    const F32 subnormal = __builtin_convertvector((I32)magnitude, F32) * 0x1p-24f;
    U32 bits = (U32)(magnitude < 0x400 ? (I32)subnormal : (I32)normal);
    bits = (U32)(magnitude >= 0x7C00 ? (I32)(normal + (112u << 23)) : (I32)bits);
    return bits | sign;
#endif
}

INLINE U32 load(const Half* x) { return half_to_float(unaligned<U16>(x)); }

// ---- Storing ----

INLINE void store(float* out, U32 bits) { std::memcpy(out, &bits, sizeof bits); }

INLINE void store_low16(void* out, U32 bits) {
    const U16 narrow = __builtin_convertvector(bits, U16);
    std::memcpy(out, &narrow, sizeof narrow);
}

INLINE void store_low8(void* out, U32 bits) {
    const U8 narrow = __builtin_convertvector(bits, U8);
    std::memcpy(out, &narrow, sizeof narrow);
}

// A store around the caches, for outputs that no cache could hold; `out` is aligned to 64 bytes.
INLINE void store_streaming(float* out, U32 bits) {
#if defined(FULL_WIDTH)
    _mm512_stream_si512((__m512i*)out, (__m512i)bits);
#else
    store(out, bits);
#endif
}

INLINE void fence_streaming() {
#if defined(FULL_WIDTH)
    _mm_sfence();
#endif
}

// ---- Questions ----

INLINE bool any_above(U32 a, U32 b) {
#if defined(FULL_WIDTH)
    return _mm512_cmpgt_epu32_mask((__m512i)a, (__m512i)b) != 0;
#else
    const I32 mask = a > b;
    int32_t any = 0;
    for (int i = 0; i < LANES; ++i) any |= mask[i];
    return any != 0;
#endif
}

INLINE U32 choose(I32 mask, U32 yes, U32 no) { return (U32)(mask ? (I32)yes : (I32)no); }

INLINE U32 maximum(U32 a, U32 b) { return choose(a > b, a, b); }
INLINE U32 minimum(U32 a, U32 b) { return choose(a < b, a, b); }

// ---- Integer arithmetic ----

// The 64-bit products of the low 32 bits of each lane with a 32-bit constant.
INLINE U64 multiply_low32(U64 a, uint32_t constant) {
#if defined(FULL_WIDTH)
    return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(constant));
#elif defined(__AVX2__)
    return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(constant));
#elif defined(__SSE2__)
    return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(constant));
#else
    return (a & 0xFFFFFFFFull) * constant;
#endif
}

INLINE U64 xor3(U64 a, U64 b, U64 c) {
#if defined(FULL_WIDTH)
    return (U64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
    return a ^ b ^ c;
#endif
}

// out[0] = the even lanes of a and b in turns, out[1] = the odd ones.
INLINE void interleave(U64 a, U64 b, U32 out[2]) {
#if defined(FULL_WIDTH)
    out[0] = (U32)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
    out[1] = (U32)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#else
    U64 even, odd;
    for (int lane = 0; lane < LANES / 2; lane += 2) {
        even[lane] = a[lane], even[lane + 1] = b[lane];
        odd[lane] = a[lane + 1], odd[lane + 1] = b[lane + 1];
    }
    out[0] = (U32)even, out[1] = (U32)odd;
#endif
}

// ---- Floating-point arithmetic with one rounding ----

// a * b + c; slow where the machine has no such instruction, but the same bits.
INLINE F32 fused_multiply_add(F32 a, F32 b, F32 c) {
#if defined(FULL_WIDTH)
    return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    F32 out;
    for (int i = 0; i < LANES; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
#endif
}

INLINE F32 square_root(F32 a) {
#if defined(FULL_WIDTH)
    return (F32)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
    return (F32)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
    return (F32)_mm_sqrt_ps((__m128)a);
#else
    F32 out;
    for (int i = 0; i < LANES; ++i) out[i] = __builtin_sqrtf(a[i]);
    return out;
#endif
}

// Element-wise work around the products that rounds nothing: FP8 bytes to values, and ReLU with its bits.
#pragma once

#include "vectors.h"

// ---- Decoding ----

// The FP32 bits of LANES bytes: E5M2 is the upper half of an FP16; E4M3 shifted by one is an FP16 too small by 2^8.
template <bool E4M3>
INLINE U32 decoded(const uint8_t* codes) {
    const U16 wide = __builtin_convertvector(unaligned<U8>(codes), U16);
    if (!E4M3) return half_to_float(wide << 8);
    const U16 magnitude = wide & 0x7F;
    const U32 value = (U32)((F32)half_to_float(magnitude << 7) * 256.0f);
    const U32 code = __builtin_convertvector(wide, U32);
    return choose((code & 0x7F) == 0x7F, splat(0x7FC00000u), value) | ((code & 0x80) << 24);
}

template <bool E4M3, bool TO_BFLOAT16>
void decode(const uint8_t* codes, void* values, int64_t count) {
    const auto put = [&](void* out, U32 bits) {
        TO_BFLOAT16 ? store_low16(out, bits >> 16) : store((float*)out, bits);
    };
    constexpr int64_t SIZE = TO_BFLOAT16 ? 2 : 4;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) put((char*)values + i * SIZE, decoded<E4M3>(codes + i));
    if (i < count) {
        uint8_t padded[LANES] = {};
        U32 buffer;
        std::memcpy(padded, codes + i, count - i);
        put(&buffer, decoded<E4M3>(padded));
        std::memcpy((char*)values + i * SIZE, &buffer, (count - i) * SIZE);
    }
}

// ---- ReLU that keeps a bit a value: bit i % 8 of byte i / 8 is set where the value is over zero ----

// x += residual (where there is one), then ReLU in place. `first` is a multiple of 8.
inline void add_relu(float* x, const float* residual, uint8_t* bits, int64_t first, int64_t last) {
    int64_t i = first;
#if defined(FULL_WIDTH)
    for (; i + 16 <= last; i += 16) {
        __m512 value = _mm512_loadu_ps(x + i);
        if (residual) value = _mm512_add_ps(value, _mm512_loadu_ps(residual + i));
        const __mmask16 over = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __mmask16 kept = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NLE_UQ);  // NaN stays
        _mm512_storeu_ps(x + i, _mm512_maskz_mov_ps(kept, value));
        std::memcpy(bits + i / 8, &over, 2);
    }
#endif
    for (; i < last; ++i) {
        const float value = residual ? x[i] + residual[i] : x[i];
        x[i] = value <= 0.0f ? 0.0f : value;
        if (i % 8 == 0) bits[i / 8] = 0;
        bits[i / 8] |= (uint8_t)((value > 0.0f) << (i % 8));
    }
}

// out = x where the bit is set, else 0.
inline void keep_where(const float* x, const uint8_t* bits, float* out, int64_t first, int64_t last) {
    int64_t i = first;
#if defined(FULL_WIDTH)
    for (; i + 16 <= last; i += 16) {
        __mmask16 over;
        std::memcpy(&over, bits + i / 8, 2);
        _mm512_storeu_ps(out + i, _mm512_maskz_loadu_ps(over, x + i));
    }
#endif
    for (; i < last; ++i) out[i] = bits[i / 8] >> (i % 8) & 1 ? x[i] : 0.0f;
}

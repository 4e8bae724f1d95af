// The CPU quantizer: one pass that loads, rounds once, counts and stores. Its bytes are those of
// fp8repro/reference.py at any thread count; it keeps no state and defines no rounding of its own.
//
// Rounding works on the bits of |x| in FP32 (FP16 and BF16 inputs are exact there). Vectors that hold only
// zeros and values in the format's normal range take a short path; others take a rare, branching one.

#include "parallel.h"
#include "philox.h"

#include <algorithm>
#include <type_traits>

namespace {

enum Rounding : int32_t { NEAREST = 0, STOCHASTIC = 1, TOWARD_ZERO = 2 };
enum Type : int32_t { NONE = 0, FLOAT32 = 1, FLOAT16 = 2, BFLOAT16 = 3, CODE8 = 4, CODE16 = 5 };

constexpr uint32_t INFINITY32 = 0x7F800000u, MAGNITUDE = 0x7FFFFFFFu, SIGN = 0x80000000u;

// Mirrored by fp8repro/native/__init__.py. Magnitudes are FP32 bit patterns.
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
};

struct Tensors {
    const void* x;
    void* values;
    void* codes;
    int32_t x_type, values_type, codes_type;
    bool stream;  // write FP32 values around the caches
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

// Rounds up if and only if draw < fraction * 2^32, the fraction being what a subnormal result discards.
INLINE U32 subnormal_stochastic(U32 magnitude, U32 draw, const Format& f) {
    const uint32_t quantum = f.smallest_normal - ((23u - (uint32_t)f.drop) << 23);
#if defined(FULL_WIDTH)
    // Truncating addition of a shifter whose ulp is the quantum, then the discarded part as a 32-bit threshold.
    const __m512 value = (__m512)magnitude;
    const __m512 shifter = (__m512)splat(f.smallest_normal + ((uint32_t)f.drop << 23));
    const __m512 sum = _mm512_add_round_ps(value, shifter, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    const F32 lower = (F32)sum - (F32)shifter;
    const F32 discarded = ((F32)value - lower) * (F32)splat(((127u + 127u + 32u) << 23) - quantum);
    const __m512i threshold =
        _mm512_cvt_roundps_epu32((__m512)discarded, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    const __mmask16 up = _mm512_cmplt_epu32_mask((__m512i)draw, threshold);
    return (U32)_mm512_mask_add_ps((__m512)lower, up, (__m512)lower, (__m512)splat(quantum));
#else
    const U32 exponent = magnitude >> 23;
    const U32 biased = choose(exponent > 0, exponent, splat(1));
    const U32 significand = choose(exponent > 0, (magnitude & 0x7FFFFF) | 0x800000, magnitude);
    // The significand holds `discarded` bits under the quantum of the subnormals.
    const U32 discarded = splat((uint32_t)f.drop + (f.smallest_normal >> 23)) - biased;
    const U32 steps = choose(discarded < 32, significand >> (discarded & 31), U32{});
    // Threshold fraction * 2^32, rounded up to an integer where it has bits of its own.
    const U32 down = choose(discarded < 63, discarded - 32, splat(31)) & 31;
    const U32 ceiling = (significand + ((splat(1) << down) - 1)) >> down;
    const U32 threshold = choose(discarded < 32, significand << ((splat(32) - discarded) & 31), ceiling);
    const U32 rounded = steps + choose(draw < threshold, splat(1), U32{});
    return (U32)(__builtin_convertvector((I32)rounded, F32) * (F32)splat(quantum));
#endif
}

INLINE U32 overflowed(U32 magnitude, U32 rounded, const Format& f) {
    const U32 finite = choose(rounded > f.largest, splat(f.beyond), rounded);
    const U32 special = choose(magnitude > INFINITY32, splat(MAGNITUDE), splat(f.infinity));
    return choose(magnitude >= INFINITY32, special, finite);
}

// ---- Blocks of N vectors ----

// x, bits of FP32 values in, bits of their rounded values out.
template <bool RANDOM, bool COUNT, int N>
INLINE void round_block(U32 x[N], const U32 draws[N], const Format& f, Counts& counts) {
    U32 magnitude[N], rounded[N];
    const uint32_t below_ulp = (1u << f.drop) - 1;
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        magnitude[k] = x[k] & MAGNITUDE;
        // Stochastic: add an ulp if the discarded bits exceed the draw's top ones, then truncate.
        rounded[k] = RANDOM ? (magnitude[k] + below_ulp - (draws[k] >> (32 - f.drop))) & ~below_ulp
                            : nearest(magnitude[k], f);
    }
    U32 largest = magnitude[0], smallest = magnitude[0] - 1;  // zero becomes the largest integer
#pragma GCC unroll 4
    for (int k = 1; k < N; ++k) {
        largest = maximum(largest, magnitude[k]);
        smallest = minimum(smallest, magnitude[k] - 1);
    }
    if (RANDOM && any_above(splat(f.smallest_normal - 1), smallest) && (f.subnormal_nearest || !f.is_wide())) {
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) {
            const U32 small = f.subnormal_nearest ? nearest(magnitude[k], f)
                                                  : subnormal_stochastic(magnitude[k], draws[k], f);
            rounded[k] = choose(magnitude[k] < f.smallest_normal, small, rounded[k]);
        }
    }
    const bool overflows = any_above(largest, splat(f.largest));
    if (__builtin_expect(overflows, 0)) {
        for (int k = 0; k < N; ++k) rounded[k] = overflowed(magnitude[k], rounded[k], f);
    }
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        if (COUNT) {
            U32 finite = magnitude[k], survivor = rounded[k];
            if (overflows) {
                finite = choose(finite < INFINITY32, finite, U32{});
                survivor = choose(finite != 0, survivor, U32{});
                counts.overflow += choose(finite > f.largest, splat(1), U32{});
            }
            counts.nonzero += choose(finite != 0, splat(1), U32{});
            counts.survivors += choose(survivor != 0, splat(1), U32{});
            counts.absmax = maximum(counts.absmax, finite);
        }
        x[k] = rounded[k] | (x[k] & SIGN);
    }
}

INLINE U32 encoded(U32 bits, const Format& f) {
#if defined(FULL_WIDTH)
    // E5M2 is the upper half of an FP16, and the conversion is exact.
    if (f.is_e5m2()) return __builtin_convertvector((U16)_mm512_cvtps_ph((__m512)bits, 0), U32) >> 8;
#endif
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

// Stores N vectors, `step` elements apart, where the tensors want them.
template <int N>
INLINE void store_block(U32 bits[N], const Tensors& t, int64_t at_values, int64_t at_codes, int64_t step,
                        const Format& f) {
    if (t.values_type == FLOAT32) {
        float* out = (float*)t.values + at_values;
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) t.stream ? store_streaming(out + k * step, bits[k]) : store(out + k * step, bits[k]);
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
        for (int k = 0; k < N; ++k) store_low8(out + k * step, encoded(bits[k], f));
    } else if (t.codes_type == CODE16) {
        uint16_t* out = (uint16_t*)t.codes + at_codes;
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) store_low16(out + k * step, encoded(bits[k], f));
    }
}

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
    const Tensors buffers = {x, values, codes, t.x_type, t.values_type, t.codes_type, false};
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

// The blocks of a run whose index is a multiple of 4; all arguments by value, so that they stay in registers.
template <typename T, bool RANDOM, bool COUNT, bool LOW>
void run_blocks(Tensors t, int64_t at_x, int64_t at_values, int64_t at_codes, int64_t blocks, uint64_t index,
                Random random, Format f, Counts& total) {
    Counts counts;
    U32 draws[4] = {splat(~0u), splat(~0u), splat(~0u), splat(~0u)};
    for (int64_t b = 0; b < blocks; ++b) {
        if (RANDOM && random.draws) philox_consecutive<LOW>(index / 4 + b * LANES, random.stream, random.key, draws);
        U32 bits[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) bits[k] = load((const T*)t.x + at_x + b * BLOCK + k * LANES);
        round_block<RANDOM, COUNT, 4>(bits, draws, f, counts);
        store_block<4>(bits, t, at_values + b * BLOCK, at_codes + b * BLOCK, LANES, f);
    }
    if (t.stream) fence_streaming();
    if (COUNT) total.add(counts);
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
            const auto piece = low ? run_blocks<T, RANDOM, COUNT, true> : run_blocks<T, RANDOM, COUNT, !RANDOM>;
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

// Rows [first, last) of a matrix of `rows` rows; logical index of (row, column): base + column * rows + row.
template <typename T, bool COUNT>
void transposed(Tensors t, int64_t at, int64_t rows, int64_t columns, int64_t first, int64_t last, uint64_t base,
                Random random, Format f, Counts& total) {
    Counts counts;
    for (int64_t column = 0; column < columns; column += LANES) {
        const int width = (int)std::min<int64_t>(LANES, columns - column);
        U64 blocks[2], skips[2];
        for (int lane = 0; lane < LANES; ++lane) blocks[lane % 2][lane / 2] = base + (column + lane) * rows + first;
        for (int g = 0; g < 2; ++g) {
            skips[g] = blocks[g] & 3;
            blocks[g] >>= 2;
        }
        const U32 skip = (U32)(skips[0] | (skips[1] << 32));
        const bool aligned = !any_above(skip, U32{});
        // A tile of four rows draws from one block a column, or from two neighbouring ones.
        U32 words[8];
        philox_gathered(blocks, random.stream, random.key, words);
        for (int64_t row = first; row < last; row += 4) {
            U32 draws[4] = {words[0], words[1], words[2], words[3]};
            blocks[0] += 1;
            blocks[1] += 1;
            if (aligned) {
                if (row + 4 < last) philox_gathered(blocks, random.stream, random.key, words);
            } else {
                philox_gathered(blocks, random.stream, random.key, words + 4);
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) {
                    for (int s = 1; s < 4; ++s) draws[r] = choose(skip == (uint32_t)s, words[r + s], draws[r]);
                }
                for (int k = 0; k < 4; ++k) words[k] = words[k + 4];
            }
            const int64_t position = at + row * columns + column;
            if (width == LANES && row + 4 <= last) {
                U32 bits[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) bits[r] = load((const T*)t.x + position + r * columns);
                round_block<true, COUNT, 4>(bits, draws, f, counts);
                store_block<4>(bits, t, position, position, columns, f);
            } else {
                for (int64_t r = 0; r < std::min<int64_t>(4, last - row); ++r) {
                    const int64_t p = position + r * columns;
                    partial<T, true, COUNT>(t, p, p, p, width, (uint32_t*)&draws[r], f, counts);
                }
            }
        }
    }
    if (COUNT) total.add(counts);
}

// ---- Threads and dispatch ----

struct Call {
    Tensors tensors;
    Format format;
    Random random;
    double* stats;
    int threads;
};

// Calls body(part, parts, counts) on all threads, then adds up the counts.
template <bool COUNT, typename Body>
void counted(const Call& call, const Body& body) {
    parallel(call.threads, [&](int part, int parts) {
        Counts counts;
        body(part, parts, counts);
        if (COUNT) {
#pragma omp critical(fp8repro_statistics)
            counts.add_to(call.stats);
        }
    });
}

struct Share {
    int64_t begin, end;
};

// This part's share of `count` items in units of `unit`.
Share share(int64_t count, int64_t unit, int part, int parts) {
    const int64_t units = (count + unit - 1) / unit;
    const int64_t begin = units * part / parts * unit, end = units * (part + 1) / parts * unit;
    return {std::min(begin, count), std::min(end, count)};
}

template <typename T, bool RANDOM, bool COUNT>
struct Kernels {
    static void linear(const Call& call, int64_t count) {
        Tensors tensors = call.tensors;
        // Past this many bytes no cache holds the output, and writing around them saves reading it first.
        tensors.stream = tensors.values_type == FLOAT32 && tensors.values != tensors.x && count >= (int64_t)1 << 23 &&
                         (uintptr_t)tensors.values % 64 == 0;
        counted<COUNT>(call, [&](int part, int parts, Counts& counts) {
            const Share s = share(count, BLOCK, part, parts);
            run<T, RANDOM, COUNT>(tensors, s.begin, s.begin, s.begin, s.end - s.begin, s.begin, call.random,
                                  call.format, counts);
        });
    }

    // layout: sizes of `outer` dimensions, then the strides of x, values and codes in them, then the run length.
    static void runs(const Call& call, int outer, const int64_t* layout) {
        const int64_t *sizes = layout, *strides = layout + outer, length = layout[4 * outer];
        int64_t count = 1;
        for (int d = 0; d < outer; ++d) count *= sizes[d];
        counted<COUNT>(call, [&](int part, int parts, Counts& counts) {
            const Share s = share(count, 1, part, parts);
            for (int64_t item = s.begin; item < s.end; ++item) {
                int64_t at[3] = {0, 0, 0}, rest = item;
                for (int d = outer - 1; d >= 0; --d) {
                    const int64_t position = rest % sizes[d];
                    rest /= sizes[d];
                    for (int k = 0; k < 3; ++k) at[k] += position * strides[k * outer + d];
                }
                run<T, RANDOM, COUNT>(call.tensors, at[0], at[1], at[2], length, (uint64_t)(item * length),
                                             call.random, call.format, counts);
            }
        });
    }

    static void transpose(const Call& call, int64_t matrices, int64_t rows, int64_t columns) {
        constexpr int64_t BLOCK = 64;  // rows whose bytes stay in the second-level cache between column groups
        const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
        counted<COUNT>(call, [&](int part, int parts, Counts& counts) {
            const Share s = share(matrices * blocks, 1, part, parts);
            for (int64_t item = s.begin; item < s.end; ++item) {
                const int64_t base = item / blocks * rows * columns, first = item % blocks * BLOCK;
                transposed<T, COUNT>(call.tensors, base, rows, columns, first, std::min(first + BLOCK, rows),
                                     (uint64_t)base, call.random, call.format, counts);
            }
        });
    }
};

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

template <typename Launch>
void dispatch(const Call& call, const Launch& launch) {
    const auto by_count = [&](auto type, auto random) {
        using T = decltype(type);
        constexpr bool RANDOM = decltype(random)::value;
        if (call.stats) launch(Kernels<T, RANDOM, true>());
        else launch(Kernels<T, RANDOM, false>());
    };
    const auto by_rounding = [&](auto type) {
        if (call.format.rounding == NEAREST) by_count(type, std::false_type());
        else by_count(type, std::true_type());
    };
    switch (call.tensors.x_type) {
        case FLOAT32: return by_rounding(float());
        case FLOAT16: return by_rounding(Half());
        case BFLOAT16: return by_rounding(BFloat16());
    }
}

}  // namespace

// The arguments every entry point shares; `types` packs those of x, values and codes, four bits each.
#define COMMON                                                                                            \
    const void *x, void *values, void *codes, int32_t types, const Format *format, uint64_t seed, uint64_t stream, \
        double *stats, int32_t threads
#define CALL                                                                                              \
    const Call call = {{x, values, codes, types & 15, (types >> 4) & 15, types >> 8, false},                     \
                       *format,                                                                           \
                       {Key(seed), stream, format->rounding == STOCHASTIC},                               \
                       stats,                                                                             \
                       threads}

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// `count` elements that lie in logical order and without gaps in all tensors.
EXPORT void fp8repro_linear(COMMON, int64_t count) {
    CALL;
    dispatch(call, [&](auto kernels) { kernels.linear(call, count); });
}

// Rows of contiguous elements, each tensor with its own distances between them.
EXPORT void fp8repro_runs(COMMON, int64_t outer, const int64_t* layout) {
    CALL;
    dispatch(call, [&](auto kernels) { kernels.runs(call, (int)outer, layout); });
}

// Matrices stored one after the other as [rows][columns], in logical order [columns][rows]; not for `NEAREST`.
EXPORT void fp8repro_transposed(COMMON, int64_t matrices, int64_t rows, int64_t columns) {
    CALL;
    dispatch(call, [&](auto kernels) { kernels.transpose(call, matrices, rows, columns); });
}

// The values of `count` FP8 bytes as FP32 or BF16.
EXPORT void fp8repro_decode(const uint8_t* codes, void* values, int32_t e4m3, int32_t type, int32_t threads, int64_t count) {
    const auto piece = e4m3 ? (type == FLOAT32 ? decode<true, false> : decode<true, true>)
                            : (type == FLOAT32 ? decode<false, false> : decode<false, true>);
    parallel(threads, [&](int part, int parts) {
        const Share s = share(count, BLOCK, part, parts);
        piece(codes + s.begin, (char*)values + s.begin * bytes_of(type), s.end - s.begin);
    });
}

// The 4 * LANES random words of LANES consecutive blocks, for comparison with Philox's published vectors.
EXPORT void fp8repro_words(uint64_t first_block, uint64_t seed, uint64_t stream, uint32_t* words) {
    U32 draws[4];
    philox_consecutive<false>(first_block, stream, Key(seed), draws);
    std::memcpy(words, draws, sizeof draws);
}

}  // extern "C"

// The CPU quantizer: one pass that loads, rounds once, counts and stores. Its bytes are those of
// fp8repro/numerics/reference.py at any thread count; it keeps no state and defines no rounding of its own.

#include "elements.h"
#include "parallel.h"
#include "walks.h"

#include <type_traits>

namespace {

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
        tensors.stream = tensors.values_type == FLOAT32 && tensors.values != tensors.x && !tensors.add && count >= (int64_t)1 << 23 &&
                         (uintptr_t)tensors.values % 64 == 0;
        counted<COUNT>(call, [&](int part, int parts, Counts& counts) {
            const Share s = share(count, BLOCK, part, parts);
            run<T, RANDOM, COUNT>(tensors, s.begin, s.begin, s.begin, s.end - s.begin, s.begin, call.random,
                                  call.format, counts);
        });
    }

    // layout: sizes of `outer` dimensions, then the strides of x, values, codes and logical order in them, then the
    // run length. Items are visited in the order of the dimensions.
    static void runs(const Call& call, int outer, const int64_t* layout) {
        const int64_t *sizes = layout, *strides = layout + outer, length = layout[5 * outer];
        int64_t count = 1;
        for (int d = 0; d < outer; ++d) count *= sizes[d];
        counted<COUNT>(call, [&](int part, int parts, Counts& counts) {
            const Share s = share(count, 1, part, parts);
            for (int64_t item = s.begin; item < s.end; ++item) {
                int64_t at[4] = {0, 0, 0, 0}, rest = item;
                for (int d = outer - 1; d >= 0; --d) {
                    const int64_t position = rest % sizes[d];
                    rest /= sizes[d];
                    for (int k = 0; k < 4; ++k) at[k] += position * strides[k * outer + d];
                }
                run<T, RANDOM, COUNT>(call.tensors, at[0], at[1], at[2], length, (uint64_t)at[3], call.random,
                                      call.format, counts);
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

// The arguments every entry point shares; `types` packs those of x, values and codes, four bits each, and whether to
// add to the values.
#define COMMON                                                                                            \
    const void *x, void *values, void *codes, int32_t types, const Format *format, uint64_t seed, uint64_t stream, \
        double *stats, int32_t threads
#define CALL                                                                                              \
    const Call call = {{x, values, codes, types & 15, (types >> 4) & 15, (types >> 8) & 15, false, types >> 12},                     \
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

// Matrices stored one after the other as [rows][columns], in logical order [columns][rows]; not for `NEAREST`, and rows
// are a multiple of 8.
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

// See elements.h; all tensors lie in the same order in memory, without gaps.
EXPORT void fp8repro_add_relu(float* x, const float* residual, uint8_t* bits, int32_t threads, int64_t count) {
    parallel(threads, [&](int part, int parts) {
        const Share s = share(count, BLOCK, part, parts);
        add_relu(x, residual, bits, s.begin, s.end);
    });
}

EXPORT void fp8repro_keep_where(const float* x, const uint8_t* bits, float* out, int32_t threads, int64_t count) {
    parallel(threads, [&](int part, int parts) {
        const Share s = share(count, BLOCK, part, parts);
        keep_where(x, bits, out, s.begin, s.end);
    });
}

// The 4 * LANES random words of LANES consecutive blocks, for comparison with Philox's published vectors.
EXPORT void fp8repro_words(uint64_t first_block, uint64_t seed, uint64_t stream, uint32_t* words) {
    U32 draws[4];
    philox_consecutive<false>(first_block, stream, Key(seed), draws);
    std::memcpy(words, draws, sizeof draws);
}

}  // extern "C"

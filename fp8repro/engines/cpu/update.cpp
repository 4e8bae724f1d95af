// The optimizer's step in one pass over memory: unscale and clip the gradient, update state and weight in FP32, round
// the weight once to its master. A chunk is computed into a buffer that stays in the cache and rounded from there.

#include "parallel.h"
#include "walks.h"

#include <cmath>
#include <vector>

namespace {

// Mirrored by fp8repro/engines/cpu/update.py. All tensors of a parameter lie in memory alike, without gaps.
struct Parameter {
    const float* grad;
    void* master;
    float* state0;       // momentum, or Adam's first moment
    float* state1;       // Adam's second moment
    float* updated;      // receives the FP32 result, or null
    uint64_t stream;     // of the master's random bits
    int64_t type;        // FLOAT32 (values of the master's format), FLOAT16 or BFLOAT16
    int64_t matrices;    // stored [rows][columns], in logical order [columns][rows]
    int64_t rows;        // 0: one run of `columns` elements in logical order
    int64_t columns;
};

enum Kind : int32_t { SGD = 0, ADAM = 1, ADAMW = 2 };

// The arithmetic of torch's optimizers; scalars were rounded to FP32 where torch does it.
struct Rule {
    int32_t kind, nesterov, first;  // first: the momentum starts with this gradient
    float scale, factor;            // the gradient is grad / scale * factor
    float rate;                     // -lr, for Adam -lr / (1 - beta1^step)
    float decay;                    // weight decay; AdamW: 1 - lr * weight decay
    float momentum;                 // SGD's; Adam: 1 - beta1
    float beta2, rest2, root2, eps;  // rest2 = 1 - beta2, root2 = sqrt(1 - beta2^step)
};

constexpr int64_t CHUNK = 4096;  // elements; its buffer stays in the first-level cache

INLINE F32 load_float(const float* x) { return unaligned<F32>(x); }

// One vector of a parameter: state in and out, the updated weight as result.
INLINE F32 updated(F32 weight, F32 grad, F32& state0, F32& state1, const Rule& r) {
    grad = grad / r.scale * r.factor;
    if (r.kind == ADAMW) weight *= r.decay;
    else if (r.decay != 0.0f) grad = fused_multiply_add(F32{} + r.decay, weight, grad);
    if (r.kind == SGD) {
        if (r.momentum != 0.0f) {
            state0 = r.first ? grad : state0 * r.momentum + grad;
            grad = r.nesterov ? fused_multiply_add(F32{} + r.momentum, state0, grad) : state0;
        }
        return fused_multiply_add(F32{} + r.rate, grad, weight);
    }
    // torch's lerp goes from the nearer end.
    state0 = r.momentum < 0.5f ? fused_multiply_add(F32{} + r.momentum, grad - state0, state0)
                               : fused_multiply_add(F32{} + (r.momentum - 1.0f), grad - state0, grad);
    state1 = fused_multiply_add(r.rest2 * grad, grad, state1 * r.beta2);
    return weight + (r.rate * state0) / (square_root(state1) / r.root2 + r.eps);
}

template <typename T>
void update_chunk(const Parameter& p, int64_t at, int64_t count, Rule r, float* out) {
    const bool has0 = p.state0 != nullptr, has1 = p.state1 != nullptr;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        F32 state0 = has0 ? load_float(p.state0 + at + i) : F32{};
        F32 state1 = has1 ? load_float(p.state1 + at + i) : F32{};
        const F32 weight = (F32)load((const T*)p.master + at + i);
        store(out + i, (U32)updated(weight, load_float(p.grad + at + i), state0, state1, r));
        if (has0) store(p.state0 + at + i, (U32)state0);
        if (has1) store(p.state1 + at + i, (U32)state1);
    }
    if (i == count) return;
    const int64_t some = count - i, from = at + i;
    T weight[LANES] = {};
    float grad[LANES] = {}, padded[2][LANES] = {};
    std::memcpy(weight, (const T*)p.master + from, some * sizeof(T));
    std::memcpy(grad, p.grad + from, some * sizeof(float));
    if (has0) std::memcpy(padded[0], p.state0 + from, some * sizeof(float));
    if (has1) std::memcpy(padded[1], p.state1 + from, some * sizeof(float));
    F32 state0 = load_float(padded[0]), state1 = load_float(padded[1]);
    const F32 result = updated((F32)load(weight), load_float(grad), state0, state1, r);
    std::memcpy(out + i, &result, some * sizeof(float));
    if (has0) std::memcpy(p.state0 + from, &state0, some * sizeof(float));
    if (has1) std::memcpy(p.state1 + from, &state1, some * sizeof(float));
}

// Some rows of a matrix, or whole matrices, brought into logical order, rounded there and taken back to their places.
template <bool RANDOM, typename T>
void round_transposed(const Parameter& p, int64_t at, int64_t count, const float* x, const Random& random, const Format& f) {
    constexpr bool STORED = sizeof(T) == 2;
    const int64_t matrix = p.rows * p.columns;
    std::vector<float> transposed(count);
    std::vector<T> rounded(count);
    const Tensors t = {transposed.data(), STORED ? nullptr : (void*)rounded.data(), STORED ? (void*)rounded.data() : nullptr,
                       FLOAT32, STORED ? NONE : FLOAT32, STORED ? CODE16 : NONE, false};
    Counts none;
    for (int64_t done = 0; done < count;) {
        const int64_t row = (at + done) % matrix / p.columns;
        const int64_t rows = std::min(p.rows - row, (count - done) / p.columns);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < p.columns; ++c) transposed[c * rows + r] = x[done + r * p.columns + c];
        }
        const uint64_t base = (uint64_t)((at + done) / matrix * matrix + row);
        // A whole matrix is one run.
        const int64_t runs = rows == p.rows ? 1 : p.columns, length = rows * p.columns / runs;
        for (int64_t i = 0; i < runs; ++i) {
            const int64_t from = i * length;
            run<float, RANDOM, false>(t, from, from, from, length, base + i * p.rows, random, f, none);
        }
        T* master = (T*)p.master + at + done;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < p.columns; ++c) master[r * p.columns + c] = rounded[c * rows + r];
        }
        done += rows * p.columns;
    }
}

// Rounds a chunk into the master; `at` and `count` in elements of memory.
template <bool RANDOM>
void round_chunk(const Parameter& p, int64_t at, int64_t count, const float* x, Random random, const Format& f) {
    const bool stored = p.type != FLOAT32;
    random.stream = p.stream;
    if (p.rows > 0) {
        const auto piece = stored ? round_transposed<RANDOM, uint16_t> : round_transposed<RANDOM, float>;
        return piece(p, at, count, x, random, f);
    }
    char* master = (char*)p.master + at * (stored ? 2 : 4);
    Tensors t = {x, nullptr, nullptr, FLOAT32, stored ? NONE : FLOAT32, stored ? CODE16 : NONE, false};
    (stored ? t.codes : t.values) = master;
    Counts none;
    run<float, RANDOM, false>(t, 0, 0, 0, count, (uint64_t)at, random, f, none);
}

int64_t size_of(const Parameter& p) { return p.rows == 0 ? p.columns : p.matrices * p.rows * p.columns; }

// Elements that are taken at once: whole matrices, of large ones rows in eights.
int64_t chunk_of(const Parameter& p) {
    if (p.rows == 0) return CHUNK;
    const int64_t matrix = p.rows * p.columns;
    if (matrix <= 4 * CHUNK) return matrix * std::max<int64_t>(1, CHUNK / matrix);
    return p.columns * PER_CALL * std::max<int64_t>(1, CHUNK / (PER_CALL * p.columns));
}

struct Chunk {
    const Parameter* parameter;
    int64_t at, count;
};

std::vector<Chunk> chunks_of(const Parameter* parameters, int64_t count) {
    std::vector<Chunk> chunks;
    for (const Parameter* p = parameters; p < parameters + count; ++p) {
        const int64_t size = size_of(*p), unit = chunk_of(*p), matrix = p->rows * p->columns;
        for (int64_t at = 0; at < size; at += chunks.back().count) {
            // Rows end with their matrix.
            const int64_t end = unit < matrix ? (at / matrix + 1) * matrix : size;
            chunks.push_back({p, at, std::min(unit, end - at)});
        }
    }
    return chunks;
}

typedef float F32Half __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef double F64 __attribute__((vector_size(VECTOR_BYTES)));

double sum_of_squares(const float* x, int64_t count) {
    constexpr int STEP = LANES / 2, WAYS = 4;
    F64 sums[WAYS] = {};
    int64_t i = 0;
    for (; i + WAYS * STEP <= count; i += WAYS * STEP) {
#pragma GCC unroll 4
        for (int k = 0; k < WAYS; ++k) {
            const F64 wide = __builtin_convertvector(unaligned<F32Half>(x + i + k * STEP), F64);
            sums[k] += wide * wide;
        }
    }
    const F64 all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = 0;
    for (int lane = 0; lane < STEP; ++lane) sum += all[lane];
    for (; i < count; ++i) sum += (double)x[i] * x[i];
    return sum;
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Sum of squares of all gradients in FP64, in one order at any thread count; not finite when a gradient is not.
EXPORT double fp8repro_sum_of_squares(const Parameter* parameters, int64_t count, int32_t threads) {
    const std::vector<Chunk> chunks = chunks_of(parameters, count);
    std::vector<double> sums(chunks.size());
    parallel_items(threads, (int64_t)chunks.size(), [&](int64_t item) {
        const Chunk& c = chunks[item];
        sums[item] = sum_of_squares(c.parameter->grad + c.at, c.count);
    });
    double sum = 0;
    for (const double each : sums) sum += each;
    return sum;
}

// One optimizer step over parameters that share a rule.
EXPORT void fp8repro_update(const Parameter* parameters, int64_t count, const Rule* rule, const Format* format,
                            uint64_t seed, int32_t threads) {
    const Random random = {Key(seed), 0, format->rounding == STOCHASTIC};
    const auto round = format->rounding == NEAREST ? round_chunk<false> : round_chunk<true>;
    const std::vector<Chunk> chunks = chunks_of(parameters, count);
    parallel_items(threads, (int64_t)chunks.size(), [&](int64_t item) {
        const auto [p, at, some] = chunks[item];
        alignas(64) float fixed[4 * CHUNK];
        std::vector<float> large(some > 4 * CHUNK ? some : 0);
        float* buffer = large.empty() ? fixed : large.data();
        switch (p->type) {
            case FLOAT32: update_chunk<float>(*p, at, some, *rule, buffer); break;
            case FLOAT16: update_chunk<Half>(*p, at, some, *rule, buffer); break;
            case BFLOAT16: update_chunk<BFloat16>(*p, at, some, *rule, buffer); break;
        }
        if (p->updated) std::memcpy(p->updated + at, buffer, some * sizeof(float));
        round(*p, at, some, buffer, random, *format);
    });
}

}  // extern "C"

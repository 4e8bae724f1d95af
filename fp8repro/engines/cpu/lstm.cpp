// What an LSTM cell computes besides sigmoids and hyperbolic tangents, which stay torch's: sums and products of rows, in
// the order of torch's own operators and with their roundings.

#include "parallel.h"

#include <cmath>
#include <cstdint>

#define EXPORT __attribute__((visibility("default")))

namespace {

// torch.addcmul(a, b, c). Where a machine multiplies and adds with one rounding, torch's compiler lets it.
template <bool FUSED>
inline float add_product(float a, float b, float c) {
    return FUSED ? std::fma(b, c, a) : a + b * c;
}

// Gates lie as [rows][4][width]: input, forget, cell, output.
template <bool FUSED>
void forward_row(const float* gates, const float* cell, float* new_cell, int64_t width) {
    const float *i = gates, *f = i + width, *g = f + width;
#pragma GCC ivdep
    for (int64_t k = 0; k < width; ++k) new_cell[k] = add_product<FUSED>(f[k] * cell[k], i[k], g[k]);
}

template <bool FUSED>
void backward_row(const float* gates, const float* cell, const float* squashed, const float* grad_hidden,
                  const float* grad_new, float* grad_gates, float* grad_cell, int64_t width) {
    const float *i = gates, *f = i + width, *g = f + width, *o = g + width;
    float *d_i = grad_gates, *d_f = d_i + width, *d_g = d_f + width, *d_o = d_g + width;
#pragma GCC ivdep
    for (int64_t k = 0; k < width; ++k) {
        const float s = squashed[k];
        const float grad = add_product<FUSED>(grad_new[k], grad_hidden[k] * o[k], 1.0f - s * s);
        d_i[k] = grad * g[k] * (i[k] * (1.0f - i[k]));
        d_f[k] = grad * cell[k] * (f[k] * (1.0f - f[k]));
        d_g[k] = grad * i[k] * add_product<FUSED>(1.0f, -g[k], g[k]);
        d_o[k] = grad_hidden[k] * s * (o[k] * (1.0f - o[k]));
        grad_cell[k] = grad * f[k];
    }
}

template <typename Row>
void each_row(int threads, int64_t rows, const Row& work) {
    parallel(threads, [&](int part, int parts) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) work(row);
    });
}

}  // namespace

extern "C" {

EXPORT void fp8repro_lstm_forward(const float* gates, const float* cell, float* new_cell, int64_t rows, int64_t width,
                                  int32_t fused, int32_t threads) {
    const auto row_of = fused ? forward_row<true> : forward_row<false>;
    each_row(threads, rows, [&](int64_t row) {
        row_of(gates + 4 * row * width, cell + row * width, new_cell + row * width, width);
    });
}

EXPORT void fp8repro_lstm_backward(const float* gates, const float* cell, const float* squashed,
                                   const float* grad_hidden, const float* grad_new, float* grad_gates,
                                   float* grad_cell, int64_t rows, int64_t width, int32_t fused, int32_t threads) {
    const auto row_of = fused ? backward_row<true> : backward_row<false>;
    each_row(threads, rows, [&](int64_t row) {
        const int64_t at = row * width;
        row_of(gates + 4 * at, cell + at, squashed + at, grad_hidden + at, grad_new + at, grad_gates + 4 * at,
               grad_cell + at, width);
    });
}

}  // extern "C"

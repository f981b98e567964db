// Products of weights with activations, one instruction set at a time: for few tokens bound by the bytes of the
// weights, for many tokens by arithmetic.
//
// Few tokens: rows of weights are dotted with every token where they lie; each weight is read once and widened once.
// Many tokens: activations lie in panels of 16 tokens, [cols][16], and so does the result, so that the output of one
// product is the input of the next and nothing is packed but the weights of a tile, which are widened to float32.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "tile.h"

namespace {

using elbowroom::kPanelTokens;
using elbowroom::Matrix;

constexpr int kPanelVectors = kPanelTokens / W;
constexpr int kMatmulRows = W == 16 ? 12 : W == 8 ? 6 : 3;  // rows of weights in a register tile
constexpr int64_t kDepth = elbowroom::kMultiplyDepth;

// y[m * ldy + r] = (add ? itself : 0) + w_r . x_m for R rows of weights and M tokens.
template <class T, int R, int M>
inline void dot_tile(const T* w, int64_t ldw, const float* x, int64_t cols, float* y, int64_t ldy,
                     bool add) {
    vf sum[R * M];
#pragma GCC unroll 24
    for (int i = 0; i < R * M; ++i) sum[i] = vf{};
    const int64_t whole = cols / W * W;
    for (int64_t k = 0; k < whole; k += W) {
        vf weights[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) weights[r] = widen(w + r * ldw + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const vf token = load<vf>(x + m * cols + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[m * R + r] += weights[r] * token;
        }
    }
    if (whole < cols) {
        for (int r = 0; r < R; ++r) {
            const vf weights = widen_padded(w + r * ldw, whole, cols);
            for (int m = 0; m < M; ++m) sum[m * R + r] += weights * widen_padded(x + m * cols, whole, cols);
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < R * M; ++i) {
        float* result = y + i / R * ldy + i % R;
        *result = sum_lanes(sum[i]) + (add ? *result : 0.0f);
    }
}

// Rows of weights in a tile of M tokens: as many sums as the registers hold.
template <int M>
constexpr int kDotRows = W == 16 ? (M <= 2 ? 8 : 24 / M) : (M <= 3 ? 4 : 12 / M);

template <class T, int M>
inline void dot_rows(const T* w, int64_t ldw, int64_t rows, const float* x, int64_t cols, float* y, int64_t ldy,
                     bool add) {
    constexpr int R = kDotRows<M>;
    int64_t r = 0;
    for (; r + R <= rows; r += R) dot_tile<T, R, M>(w + r * ldw, ldw, x, cols, y + r, ldy, add);
    for (; r < rows; ++r) dot_tile<T, 1, M>(w + r * ldw, ldw, x, cols, y + r, ldy, add);
}

// Up to 4 tokens a tile; a second tile reads its weights from the cache.
template <class T>
void dot_any(const T* w, int64_t ldw, int64_t rows, const float* x, int64_t cols, int64_t num_tokens, float* y,
             int64_t ldy, bool add) {
    constexpr int64_t kRowBlock = 12;
    for (int64_t r = 0; r < rows; r += kRowBlock) {
        const int64_t count = min(kRowBlock, rows - r);
        for (int64_t m = 0; m < num_tokens;) {
            const int64_t left = num_tokens - m, tokens = left == 5 || left == 6 ? 3 : min(left, 4);
            const float* in = x + m * cols;
            float* out = y + m * ldy + r;
            switch (tokens) {
                case 1: dot_rows<T, 1>(w + r * ldw, ldw, count, in, cols, out, ldy, add); break;
                case 2: dot_rows<T, 2>(w + r * ldw, ldw, count, in, cols, out, ldy, add); break;
                case 3: dot_rows<T, 3>(w + r * ldw, ldw, count, in, cols, out, ldy, add); break;
                default: dot_rows<T, 4>(w + r * ldw, ldw, count, in, cols, out, ldy, add);
            }
            m += tokens;
        }
    }
}

template <class T>
void multiply_any(const Matrix& matrix, int64_t first, int64_t end, const float* x, int64_t num_panels, float* y,
                  int64_t y_stride, bool add, float* scratch) {
    const T* w = reinterpret_cast<const T*>(matrix.row(first));
    const int64_t ldw = matrix.row_bytes / int64_t{sizeof(T)}, rows = end - first, cols = matrix.cols;
    for (int64_t k = 0; k < cols; k += kDepth) {
        const int64_t depth = min(kDepth, cols - k);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < depth; i += W) {
                store(scratch + r * kDepth + i, widen_padded(w + r * ldw + k, i, depth));
            }
        }
        for (int64_t p = 0; p < num_panels; ++p) {
            const float* panel = x + (p * cols + k) * kPanelTokens;
            float* out = y + p * y_stride;
            for (int64_t r = 0; r < rows; r += kMatmulRows) {
                tile_rows<kPanelVectors, kMatmulRows>(min(kMatmulRows, rows - r), scratch + r * kDepth, kDepth, panel,
                                                      kPanelTokens, out + r * kPanelTokens, kPanelTokens, depth, add || k > 0);
            }
        }
    }
}

void dot(const Matrix& matrix, int64_t first, int64_t end, const float* x, int64_t num_tokens, float* y, int64_t ldy,
         bool add) {
    with_type(matrix.dtype, [&]<class T>(const T*) {
        dot_any(reinterpret_cast<const T*>(matrix.row(first)), matrix.row_bytes / int64_t{sizeof(T)}, end - first, x,
                matrix.cols, num_tokens, y, ldy, add);
    });
    if (matrix.bias == nullptr) return;
    for (int64_t m = 0; m < num_tokens; ++m) {
        for (int64_t n = first; n < end; ++n) y[m * ldy + n - first] += matrix.bias[n];
    }
}

void multiply(const Matrix& matrix, int64_t first, int64_t end, const float* x, int64_t num_panels, float* y,
              int64_t y_stride, bool add, float* scratch) {
    with_type(matrix.dtype, [&]<class T>(const T*) {
        multiply_any<T>(matrix, first, end, x, num_panels, y, y_stride, add, scratch);
    });
    if (matrix.bias == nullptr) return;
    for (int64_t p = 0; p < num_panels; ++p) {
        for (int64_t n = first; n < end; ++n) {
            float* lanes = y + p * y_stride + (n - first) * kPanelTokens;
            for (int64_t i = 0; i < kPanelTokens; i += W) store(lanes + i, load<vf>(lanes + i) + matrix.bias[n]);
        }
    }
}

}  // namespace

// Products of weights with activations, one instruction set at a time: for few tokens bound by the bytes of the
// weights, for many tokens by arithmetic.
//
// Few tokens: rows of weights are dotted with every token where they lie; each weight is read from memory once.
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

// --- few tokens --------------------------------------------------------------------------------------------------------

constexpr int64_t kGroup = 2 * W;               // columns of two vectors
constexpr int64_t kPrefetchBytes = 4096;        // how far ahead of its use a row of weights is asked for
constexpr int64_t kDotRowBlock = 12;            // rows whose weights stay in the cache while groups of tokens pass

constexpr int64_t kMostTokens = W == 16 ? 8 : 5;  // tokens of a register tile: what the registers hold

// Tokens pass in groups of nearly equal size, none above kMostTokens: calls f(first token, tokens).
template <class F>
inline void for_groups(int64_t num_tokens, F&& f) {
    int64_t groups = (num_tokens + kMostTokens - 1) / kMostTokens;
    for (int64_t m = 0; groups > 0; --groups) {
        const int64_t tokens = (num_tokens - m + groups - 1) / groups;
        f(m, tokens);
        m += tokens;
    }
}

// Tokens [num_tokens, cols] -> for each group of M tokens, for each kGroup columns: [2][M][W] in the order of
// widen_first and widen_second, zeros behind the end. A tile then reads its tokens as one stream.
template <class T>
void arrange_rows(const float* x, int64_t num_tokens, int64_t cols, float* out) {
    for_groups(num_tokens, [&](int64_t first, int64_t tokens) {
        for (int64_t k = 0; k < cols; k += kGroup) {
            for (int64_t m = 0; m < tokens; ++m) {
                const float* row = x + (first + m) * cols;
                vf a = widen_padded(row, k, cols), b = k + W < cols ? widen_padded(row, k + W, cols) : vf{};
                if constexpr (std::is_same_v<T, bf16>) deinterleave(a, b);
                store(out + m * W, a);
                store(out + (tokens + m) * W, b);
            }
            out += tokens * kGroup;
        }
    });
}

// The sums of N vectors, to be added to or to replace y[m * ldy + r] for i = m * R + r.
template <int R, int N>
inline void store_sums(vf (&sum)[N], float* y, int64_t ldy, bool add) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i += W) {
        vf part[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) part[j] = i + j < N ? sum[i + j] : vf{};
        const vf sums = sum_each(part);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
            if (i + j >= N) continue;
            float* result = y + (i + j) / R * ldy + (i + j) % R;
            *result = add ? *result + sums[j] : sums[j];
        }
    }
}

// y[m * ldy + r] = (add ? itself : 0) + w_r . x_m for R rows of weights and a group of M arranged tokens.
template <class T, int R, int M, bool Prefetch>
inline void dot_tile(const T* w, int64_t ldw, int64_t cols, const float* x, float* y, int64_t ldy, bool add) {
    vf sum[R * M];
#pragma GCC unroll 24
    for (int i = 0; i < R * M; ++i) sum[i] = vf{};
    const auto group = [&](const auto& row_at) __attribute__((always_inline)) {
        vf weights[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) weights[r] = widen_first(row_at(r));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            vf token = load<vf>(x + m * W);
            keep(token);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[m * R + r] += weights[r] * token;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) weights[r] = widen_second(row_at(r));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            vf token = load<vf>(x + (M + m) * W);
            keep(token);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[m * R + r] += weights[r] * token;
        }
        x += M * kGroup;
    };
    const int64_t whole = cols / kGroup * kGroup;
#pragma GCC unroll 2
    for (int64_t k = 0; k < whole; k += kGroup) {
        if (Prefetch && k % (64 / int64_t{sizeof(T)}) == 0) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) __builtin_prefetch(w + (R + r) * ldw + k, 0, 3);
        }
        group([&](int r) __attribute__((always_inline)) { return w + r * ldw + k; });
    }
    if (whole < cols) {
        T tail[R][kGroup] = {};
        for (int r = 0; r < R; ++r) __builtin_memcpy(tail[r], w + r * ldw + whole, (cols - whole) * sizeof(T));
        group([&](int r) __attribute__((always_inline)) { return tail[r]; });
    }
    store_sums<R>(sum, y, ldy, add);
}

// One row and one token: the weights pass as one stream, several sums hide the latency of the additions.
template <class T>
inline void dot_one(const T* w, int64_t cols, const float* x, float* y, bool add) {
    constexpr int kGroups = 4;
    vf sum[2 * kGroups];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kGroups; ++i) sum[i] = vf{};
    int64_t k = 0;
    for (; k + kGroups * kGroup <= cols; k += kGroups * kGroup) {
        for (int64_t b = 0; b < kGroups * kGroup * int64_t{sizeof(T)}; b += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kPrefetchBytes + b, 0, 3);
        }
#pragma GCC unroll 4
        for (int u = 0; u < kGroups; ++u) {
            sum[2 * u] += widen_first(w + k + u * kGroup) * load<vf>(x + k + u * kGroup);
            sum[2 * u + 1] += widen_second(w + k + u * kGroup) * load<vf>(x + k + u * kGroup + W);
        }
    }
    for (; k < cols; k += kGroup) {
        T tail[kGroup] = {};
        __builtin_memcpy(tail, w + k, min(kGroup, cols - k) * sizeof(T));
        sum[0] += widen_first(tail) * load<vf>(x + k);
        sum[1] += widen_second(tail) * load<vf>(x + k + W);
    }
#pragma GCC unroll 8
    for (int i = 1; i < 2 * kGroups; ++i) sum[0] += sum[i];
    *y = sum_lanes(sum[0]) + (add ? *y : 0.0f);
}

// Rows of weights in a tile of M tokens: as many sums as the registers hold beside weights and a token.
template <int M>
constexpr int kDotRows = W == 16 ? (M <= 2 ? 6 : M <= 4 ? 4 : 3) : (M <= 2 ? 4 : M == 3 ? 3 : 2);

template <class T, int M, bool Prefetch>
inline void dot_rows(const T* w, int64_t ldw, int64_t rows, int64_t cols, const float* x, float* y, int64_t ldy,
                     bool add) {
    constexpr int R = kDotRows<M>;
    int64_t r = 0;
    if constexpr (M == 1) {
        for (; r < rows; ++r) dot_one(w + r * ldw, cols, x, y + r, add);
    } else {
        for (; r + R <= rows; r += R) {
            dot_tile<T, R, M, Prefetch>(w + r * ldw, ldw, cols, x, y + r, ldy, add);
        }
        for (; r < rows; ++r) dot_tile<T, 1, M, false>(w + r * ldw, ldw, cols, x, y + r, ldy, add);
    }
}

template <class T, bool Prefetch, int M = kMostTokens>
inline void dot_group(int64_t tokens, const T* w, int64_t ldw, int64_t rows, int64_t cols, const float* x, float* y,
                      int64_t ldy, bool add) {
    if constexpr (M > 1) {
        if (tokens < M) return dot_group<T, Prefetch, M - 1>(tokens, w, ldw, rows, cols, x, y, ldy, add);
    }
    dot_rows<T, M, Prefetch>(w, ldw, rows, cols, x, y, ldy, add);
}

// All groups of tokens pass a block of rows; all but the first read it from the cache.
template <class T>
void dot_any(const T* w, int64_t ldw, int64_t rows, int64_t cols, const float* x, int64_t num_tokens, float* y,
             int64_t ldy, bool add) {
    const int64_t width = round_up(cols, kGroup);
    for (int64_t r = 0; r < rows; r += kDotRowBlock) {
        const int64_t count = min(kDotRowBlock, rows - r);
        const T* block = w + r * ldw;
        for_groups(num_tokens, [&](int64_t m, int64_t tokens) {
            const float* group = x + m * width;
            float* out = y + m * ldy + r;
            if (m == 0) {
                dot_group<T, true>(tokens, block, ldw, count, cols, group, out, ldy, add);
            } else {
                dot_group<T, false>(tokens, block, ldw, count, cols, group, out, ldy, add);
            }
        });
    }
}

// --- many tokens -------------------------------------------------------------------------------------------------------

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

void arrange(const Matrix& matrix, const float* x, int64_t num_tokens, float* out) {
    with_type(matrix.dtype, [&]<class T>(const T*) { arrange_rows<T>(x, num_tokens, matrix.cols, out); });
}

void dot(const Matrix& matrix, int64_t first, int64_t end, const float* x, int64_t num_tokens, float* y, int64_t ldy,
         bool add) {
    with_type(matrix.dtype, [&]<class T>(const T*) {
        dot_any(reinterpret_cast<const T*>(matrix.row(first)), matrix.row_bytes / int64_t{sizeof(T)}, end - first,
                matrix.cols, x, num_tokens, y, ldy, add);
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

// The register tile that every product of many vectors is made of.
#pragma once

#include <cstdint>

#include "simd.h"

namespace {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// C[MR, NV * W] = (accumulate ? C : 0) + A[MR, depth] B[depth, NV * W].
template <int MR, int NV>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                 bool accumulate) {
    vf sum[MR][NV];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) sum[m][n] = accumulate ? load<vf>(c + m * ldc + n * W) : vf{};
    }
    // Unrolled for the instructions it saves: a core that is shared by two hardware threads issues only half as many,
    // and then they, not the multipliers, are the limit (+15 % measured there; 8 rounds are slower again).
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
        vf row[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) row[n] = load<vf>(b + k * ldb + n * W);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
            const vf scalar = splat(a[m * lda + k]);
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) sum[m][n] += scalar * row[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) store(c + m * ldc + n * W, sum[m][n]);
    }
}

// The same for any number of rows up to MR.
template <int NV, int MR>
inline void tile_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                      int64_t depth, bool accumulate) {
    if constexpr (MR > 1) {
        if (rows < MR) return tile_rows<NV, MR - 1>(rows, a, lda, b, ldb, c, ldc, depth, accumulate);
    }
    tile<MR, NV>(a, lda, b, ldb, c, ldc, depth, accumulate);
}

}  // namespace

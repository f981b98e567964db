// Products of small unsigned codes with signed bytes, one instruction set at a time.
//
// Codes [contraction][outputs] lie in quads: four consecutive rows side by side, so that one instruction multiplies four
// products of each output. A quad holds groups of 32 outputs, 128 codes each (code 4 * output + row), in runs of 32:
// consecutive runs share the bytes of one 32-byte vector, the first one in the lowest bits.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using elbowroom::kSealedRows;  // what 16 registers hold beside two vectors of codes

constexpr int kQuad = 4;
constexpr int kGroupOutputs = 32;

typedef uint8_t bytes32 __attribute__((vector_size(32)));
typedef int16_t shorts16 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));

inline constexpr int64_t group_bytes(int bits) { return kQuad * kGroupOutputs * bits / 8; }

// Adjacent products of unsigned a and signed b, added in pairs. Never saturates here: 2 * 15 * 127 fits.
inline shorts16 multiply_pairs(bytes32 a, bytes32 b) {
#if defined(__AVX2__)
    return bit_cast<shorts16>(_mm256_maddubs_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
    const shorts16 left = bit_cast<shorts16>(a), right = bit_cast<shorts16>(b);
    return (left & 0xff) * ((right << 8) >> 8) + ((left >> 8) & 0xff) * (right >> 8);
#endif
}

inline ints8 add_pairs(shorts16 x) {
#if defined(__AVX2__)
    return bit_cast<ints8>(_mm256_madd_epi16(bit_cast<__m256i>(x), _mm256_set1_epi16(1)));
#else
    const ints8 both = bit_cast<ints8>(x);
    return ((both << 16) >> 16) + (both >> 16);
#endif
}

inline bytes32 splat_quad(int32_t x) { return bit_cast<bytes32>(ints8{} + x); }

// Run `Run` of the 128 codes of a group.
template <int Bits, int Run>
inline bytes32 unpack_run(const uint8_t* group) {
    constexpr int kRuns = 8 / Bits;
    const shorts16 packed = load<shorts16>(group + Run / kRuns * 32);
    return bit_cast<bytes32>((packed >> (Run % kRuns * Bits)) & int16_t(((1 << Bits) - 1) * 0x101));
}

// Quads that 16-bit sums hold.
template <int Bits>
constexpr int64_t kSafeQuads = 32767 / (2 * 127 * ((1 << Bits) - 1)) / 2 * 2;

// out[m * ldo + o] (+)= sum over quads of codes and x[m * ldx + quad], for two runs (16 outputs).
template <int Bits, int M, int Run>
inline void multiply_runs(const uint8_t* codes, int64_t stride, int64_t num_quads, const int32_t* x, int64_t ldx,
                          int32_t* out, int64_t ldo, bool add) {
    shorts16 sum[2 * M] = {};
#pragma GCC unroll 2
    for (int64_t j = 0; j < num_quads; ++j, codes += stride) {
        const bytes32 first = unpack_run<Bits, Run>(codes), second = unpack_run<Bits, Run + 1>(codes);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const bytes32 factor = splat_quad(x[m * ldx + j]);
            sum[2 * m] += multiply_pairs(first, factor);
            sum[2 * m + 1] += multiply_pairs(second, factor);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * M; ++i) {
        int32_t* target = out + i / 2 * ldo + Run * 8 + i % 2 * 8;
        store(target, add ? load<ints8>(target) + add_pairs(sum[i]) : add_pairs(sum[i]));
    }
}

// out[m * ldo + o] = sum over rows of codes[row][o] * x[m][row], M <= kSealedRows, for `num_groups` groups of 32 outputs;
// x in quads of signed bytes; quads of codes lie `stride` bytes apart.
template <int Bits, int M = kSealedRows>
inline void multiply_codes(int64_t rows, const uint8_t* codes, int64_t stride, int64_t num_quads, int64_t num_groups,
                           const int32_t* x, int64_t ldx, int32_t* out, int64_t ldo) {
    if constexpr (M > 1) {
        if (rows < M) return multiply_codes<Bits, M - 1>(rows, codes, stride, num_quads, num_groups, x, ldx, out, ldo);
    }
    for (int64_t g = 0; g < num_groups; ++g, codes += group_bytes(Bits), out += kGroupOutputs) {
        for (int64_t j = 0; j < num_quads; j += kSafeQuads<Bits>) {
            const int64_t count = num_quads - j < kSafeQuads<Bits> ? num_quads - j : kSafeQuads<Bits>;
            multiply_runs<Bits, M, 0>(codes + j * stride, stride, count, x + j, ldx, out, ldo, j > 0);
            multiply_runs<Bits, M, 2>(codes + j * stride, stride, count, x + j, ldx, out, ldo, j > 0);
        }
    }
}

// The way in: 128 codes of a group -> its bytes.
template <int Bits>
inline void pack_group(const uint8_t* codes, uint8_t* group) {
    constexpr int kRuns = 8 / Bits;
    for (int64_t i = 0; i < group_bytes(Bits); ++i) {
        const uint8_t* first = codes + i / 32 * 32 * kRuns + i % 32;
        int byte = 0;
        for (int run = 0; run < kRuns; ++run) byte |= first[run * 32] << (run * Bits);
        group[i] = uint8_t(byte);
    }
}

}  // namespace

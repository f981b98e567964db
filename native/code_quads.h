// Products of codes that lie token by token (codecs int8, bfp) with integers, one instruction set at a time.
//
// A strip is first laid out in quads: 32-bit lanes that hold four codes of one output, of neighbouring channels (keys,
// outputs are tokens) or of the tokens j, j + 16, j + 32 and j + 48 (values, outputs are channels). All query vectors
// share that. Codes of 8 bits are signed and multiplied with 16-bit integers: a quad gives two pairs of 16-bit numbers,
// 256 times too large. Codes of 4 bits have 8 added and are multiplied with signed bytes. Sums are exact.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "row_formats.h"
#include "simd.h"
#include "tile.h"

namespace {

using elbowroom::kStripTokens;

constexpr int64_t kValueQuads = kStripTokens / 4;

constexpr int kByteLanes = 4 * W;

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(kByteLanes)));

// --- layouts -----------------------------------------------------------------------------------------------------------

// Keys: quads[quad * 64 + token]; quad i holds four neighbouring bytes of a token, or of 4 bits its two halves hold quads
// 2 i and 2 i + 1. Reads up to 4 W - 4 bytes behind the last row.
template <int Bits>
void key_quads(const char* codes, int64_t row_bytes, int32_t* quads) {
    constexpr int64_t kStep = kStripTokens * 8 / Bits;
    const int64_t groups = (row_bytes + 3) / 4;
    for (int64_t group = 0; group < groups; group += W, quads += W * kStep) {
        for (int64_t token = 0; token < kStripTokens; token += W) {
            vf rows[W];
            const char* source = codes + token * row_bytes + 4 * group;
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) rows[i] = load<vf>(source + i * row_bytes);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                int32_t* target = quads + i * kStep + token;
                if constexpr (Bits == 8) {
                    store(target, rows[i]);
                } else {
                    store(target, bit_cast<vu>(rows[i]) & 0x0f0f0f0fu);
                    store(target + kStripTokens, bit_cast<vu>(rows[i]) >> 4 & 0x0f0f0f0fu);
                }
            }
        }
    }
}

// The same quads of keys in planes, as signed codes of 8 bits: their two halves put together, less 128.
inline void plane_quads(const char* high, const char* low, int64_t row_bytes, int32_t* quads) {
    constexpr int64_t kStep = 2 * kStripTokens;
    for (int64_t group = 0; group < (row_bytes + 3) / 4; group += W, quads += W * kStep) {
        for (int64_t token = 0; token < kStripTokens; token += W) {
            vf above[W], below[W];
            const int64_t source = token * row_bytes + 4 * group;
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) above[i] = load<vf>(high + source + i * row_bytes);
            transpose(above);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) below[i] = load<vf>(low + source + i * row_bytes);
            transpose(below);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                const vu a = bit_cast<vu>(above[i]), b = bit_cast<vu>(below[i]);
                int32_t* target = quads + i * kStep + token;
                store(target, ((a << 4 & 0xf0f0f0f0u) | (b & 0x0f0f0f0fu)) ^ 0x80808080u);
                store(target + kStripTokens, ((a & 0xf0f0f0f0u) | (b >> 4 & 0x0f0f0f0fu)) ^ 0x80808080u);
            }
        }
    }
}

// In each 16 bytes, as the instructions have it: the low or the high halves of a and b in turn, bytes or pairs of them.
template <int Size, int Half, class V, int... I>
inline V in_turn(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int kBytes = sizeof(V);
    const auto place = [](int i) constexpr {
        const int lane = i / 16 * 16, unit = i % 16 / Size;
        return lane + Half * 8 + unit / 2 * Size + i % Size + unit % 2 * kBytes;
    };
    return __builtin_shufflevector(a, b, place(I)...);
}

// Bytes of four rows, four by four: part p holds those of bytes 16 l + 4 p .. 16 l + 4 p + 3 of the rows in its l-th 16.
template <class V>
struct Interleaved {
    V part[4];

    Interleaved(const char* source, int64_t row_bytes) {
        constexpr auto kIndex = std::make_integer_sequence<int, int(sizeof(V))>{};
        V rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) rows[i] = load<V>(source + i * row_bytes);
        const V low = in_turn<1, 0>(rows[0], rows[1], kIndex), other_low = in_turn<1, 0>(rows[2], rows[3], kIndex);
        const V high = in_turn<1, 1>(rows[0], rows[1], kIndex), other_high = in_turn<1, 1>(rows[2], rows[3], kIndex);
        part[0] = in_turn<2, 0>(low, other_low, kIndex), part[1] = in_turn<2, 1>(low, other_low, kIndex);
        part[2] = in_turn<2, 0>(high, other_high, kIndex), part[3] = in_turn<2, 1>(high, other_high, kIndex);
    }
};

// Of a block of `count` channels in 8 bits, those whose columns are out of order: whole vectors of bytes.
inline int64_t unordered_columns(int64_t count) { return count / kByteLanes * kByteLanes; }

// Values: quads[quad * stride + channel] = tokens quad + 0, 16, 32, 48 of a channel; see `order_columns`. Reads up to 15
// bytes behind the last row; writes up to 15 columns behind the last channel.
template <int Bits>
void value_quads(const char* codes, int64_t row_bytes, int64_t block, int64_t stride, int32_t* quads) {
    const int64_t block_bytes = block * Bits / 8;
    for (int64_t quad = 0; quad < kValueQuads; ++quad, codes += row_bytes, quads += stride) {
        for (int64_t first = 0; first < row_bytes; first += block_bytes) {
            int32_t* target = quads + first * 8 / Bits;
            int64_t byte = 0;
            if constexpr (Bits == 8) {
                for (; byte < unordered_columns(block); byte += kByteLanes) {
                    const Interleaved<vb> of(codes + first + byte, kValueQuads * row_bytes);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) store(target + byte + W * i, of.part[i]);
                }
            }
            for (; byte < block_bytes; byte += 16) {
                const Interleaved<bytes16> of(codes + first + byte, kValueQuads * row_bytes);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    if constexpr (Bits == 8) {
                        store(target + byte + 4 * i, of.part[i]);
                    } else if (byte + 4 * i < block_bytes) {  // two channels in a byte: half a block apart
                        store(target + byte + 4 * i, of.part[i] & 15);
                        store(target + block / 2 + byte + 4 * i, of.part[i] >> 4);
                    }
                }
            }
        }
    }
}

// Puts sums over a block of values in 8 bits into the order of its channels.
inline void order_columns(float* sums, int64_t block) {
    for (int64_t first = 0; first < unordered_columns(block); first += kByteLanes, sums += kByteLanes) {
        float ordered[kByteLanes];
        for (int lane = 0; lane < W / 4; ++lane) {
            for (int part = 0; part < 4; ++part) {
                __builtin_memcpy(ordered + 16 * lane + 4 * part, sums + W * part + 4 * lane, 16);
            }
        }
        __builtin_memcpy(sums, ordered, sizeof ordered);
    }
}

// --- the other factor --------------------------------------------------------------------------------------------------

// 32-bit words of a quad's factor.
template <int Bits>
constexpr int64_t kFactorWords = Bits == 8 ? 2 : 1;

// factor = scale * integer, nearly; `sum`: of the integers.
struct Factor {
    float scale;
    int32_t sum;
};

// The scale by which `count` numbers of that largest magnitude and sum of magnitudes become integers. 16-bit ones keep
// the sum of their products with codes, 256 times too large, below 2^31: half a unit of rounding each fits as well for
// up to 1024 numbers. Poisoned by what is not finite.
template <int Bits>
inline float factor_scale(float largest, float sum) {
    if (Bits == 4) return largest / 127.0f + sum * 0.0f;
    const float by_largest = largest / 32767.0f, by_sum = sum / 65000.0f;
    return (by_largest > by_sum ? by_largest : by_sum) + sum * 0.0f;
}

// Of numbers; what is none shows in their sum.
template <int Step = W / 2>
inline float greatest_lane(vf v) {
    v = vmax(v, swap_blocks<Step>(v, Lanes{}));
    if constexpr (Step > 1) return greatest_lane<Step / 2>(v);
    return v[0];
}

inline float inverse_of(float scale) { return scale > 1e-35f ? 1.0f / scale : 0.0f; }

// Rounds to even; the low bits of the result hold the integer.
inline vi round_lanes(vf x) { return bit_cast<vi>(x + 12582912.0f) - 0x4b400000; }

// The factor of keys: queries x [count], zeros behind them up to whole vectors and quads, in the order of `key_quads` for
// codes of Order bits.
template <int Bits, int Order = Bits>
Factor round_queries(const float* x, int64_t count, int32_t* words) {
    vf top{}, magnitudes{};
    for (int64_t i = 0; i < count; i += W) {
        const vf value = load<vf>(x + i), magnitude = vmax(value, -value);
        top = vmax(top, magnitude);
        magnitudes += magnitude;
    }
    const float scale = factor_scale<Bits>(greatest_lane(top), sum_lanes(magnitudes)), inverse = inverse_of(scale);
    int32_t sum = 0;
    for (int64_t quad = 0; 4 * quad < count; ++quad) {
        const float* source = x + (Order == 8 ? 4 * quad : quad % 2 * (count / 2) + quad / 2 * 4);
        int32_t lanes[4];
        for (int k = 0; k < 4; ++k) {
            lanes[k] = bit_cast<int32_t>(source[k] * inverse + 12582912.0f) - 0x4b400000;
            sum += lanes[k];
        }
        if constexpr (Bits == 8) {
            *words++ = (lanes[0] & 0xffff) | lanes[2] << 16;
            *words++ = (lanes[1] & 0xffff) | lanes[3] << 16;
        } else {
            *words++ = (lanes[0] & 0xff) | (lanes[1] & 0xff) << 8 | (lanes[2] & 0xff) << 16 | lanes[3] << 24;
        }
    }
    return {Bits == 8 ? scale / 256.0f : scale, sum};
}

// The factor of values: 64 weights >= 0 times the scales of their tokens. A weight of 0 hides whatever its scale is.
template <int Bits>
inline Factor round_weights(const float* weights, const float* scales, int32_t* words) {
    constexpr int kVectors = kStripTokens / W;
    vf folded[kVectors], top{}, total{};
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
        const vf weight = load<vf>(weights + i * W);
        folded[i] = weight == 0.0f ? vf{} : weight * load<vf>(scales + i * W);
        top = vmax(top, folded[i]);
        total += folded[i];
    }
    const float scale = factor_scale<Bits>(greatest_lane(top), sum_lanes(total)), inverse = inverse_of(scale);
    vi sums{};
    constexpr int kQuarter = kVectors / 4;
#pragma GCC unroll 4
    for (int i = 0; i < kQuarter; ++i) {
        vi lanes[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            lanes[k] = round_lanes(folded[k * kQuarter + i] * inverse);
            if constexpr (Bits == 4) sums += lanes[k];
        }
        if constexpr (Bits == 8) {
            // Words in turn, so that a quad's two lie side by side.
            vf even = bit_cast<vf>((lanes[0] & 0xffff) | lanes[2] << 16);
            vf odd = bit_cast<vf>((lanes[1] & 0xffff) | lanes[3] << 16);
            interleave(even, odd);
            store(words + 2 * i * W, even);
            store(words + 2 * i * W + W, odd);
        } else {
            store(words + i * W, lanes[0] | lanes[1] << 8 | lanes[2] << 16 | lanes[3] << 24);
        }
    }
    return {Bits == 8 ? scale / 256.0f : scale, Bits == 8 ? 0 : int32_t(sum_lanes(to_float(sums)))};
}

// --- products ----------------------------------------------------------------------------------------------------------

// Adjacent products of signed 16-bit numbers, added in pairs.
inline vi madd_words(vi a, vi b) {
#if defined(__AVX512BW__) && ELBOWROOM_WIDTH == 16
    return bit_cast<vi>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__) && ELBOWROOM_WIDTH == 8
    return bit_cast<vi>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__) && ELBOWROOM_WIDTH == 4
    return bit_cast<vi>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Adjacent products of unsigned bytes and signed ones, added in pairs; 2 * 15 * 127 fits.
inline vw madd_bytes(vi a, vi b) {
#if defined(__AVX512BW__) && ELBOWROOM_WIDTH == 16
    return bit_cast<vw>(_mm512_maddubs_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__) && ELBOWROOM_WIDTH == 8
    return bit_cast<vw>(_mm256_maddubs_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
    const vw left = bit_cast<vw>(a), right = bit_cast<vw>(b);
    return (left & 0xff) * ((right << 8) >> 8) + ((left >> 8) & 0xff) * (right >> 8);
#endif
}

inline vi splat_int(int32_t x) { return vi{} + x; }

constexpr int64_t kByteQuads = 32767 / (2 * 15 * 127);  // quads that 16-bit sums hold

// use(m, column, sums): sums over quads of codes[quad][column ..] and the words of vector m, for NV vectors of columns.
template <int Bits, int M, int NV, class F>
inline void multiply_columns(const int32_t* quads, int64_t stride, int64_t num_quads, const int32_t* x, int64_t ldx,
                             int64_t column, F&& use) {
    vi sum[M * NV];
#pragma GCC unroll 8
    for (int i = 0; i < M * NV; ++i) sum[i] = vi{};
    if constexpr (Bits == 8) {
        for (int64_t j = 0; j < num_quads; ++j) {
            vi even[NV], odd[NV];
#pragma GCC unroll 2
            for (int n = 0; n < NV; ++n) {
                const vi codes = load<vi>(quads + j * stride + column + n * W);
                even[n] = bit_cast<vi>(bit_cast<vw>(codes) << 8);
                odd[n] = codes & int32_t(0xff00ff00u);
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const vi first = splat_int(x[m * ldx + 2 * j]), second = splat_int(x[m * ldx + 2 * j + 1]);
#pragma GCC unroll 2
                for (int n = 0; n < NV; ++n) {
                    sum[m * NV + n] += madd_words(even[n], first);
                    sum[m * NV + n] += madd_words(odd[n], second);
                }
            }
        }
    } else {
        for (int64_t first = 0; first < num_quads; first += kByteQuads) {
            const int64_t end = min(first + kByteQuads, num_quads);
            vw part[M * NV];
#pragma GCC unroll 8
            for (int i = 0; i < M * NV; ++i) part[i] = vw{};
            for (int64_t j = first; j < end; ++j) {
vi codes[NV];
#pragma GCC unroll 2
                for (int n = 0; n < NV; ++n) codes[n] = load<vi>(quads + j * stride + column + n * W);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    const vi factor = splat_int(x[m * ldx + j]);
#pragma GCC unroll 2
                    for (int n = 0; n < NV; ++n) part[m * NV + n] += madd_bytes(codes[n], factor);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < M * NV; ++i) sum[i] += madd_words(bit_cast<vi>(part[i]), splat_int(0x00010001));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) use(m, column + n * W, sum[m * NV + n]);
    }
}

// The same for `columns` columns, a multiple of W, and any number of vectors up to M.
template <int Bits, int M, class F>
inline void multiply_quads(int64_t rows, const int32_t* quads, int64_t stride, int64_t num_quads, int64_t columns,
                           const int32_t* x, int64_t ldx, F&& use) {
    if constexpr (M > 1) {
        if (rows < M) return multiply_quads<Bits, M - 1>(rows, quads, stride, num_quads, columns, x, ldx, use);
    }
    int64_t column = 0;
    for (; column + 2 * W <= columns; column += 2 * W) {
        multiply_columns<Bits, M, 2>(quads, stride, num_quads, x, ldx, column, use);
    }
    if (column < columns) multiply_columns<Bits, M, 1>(quads, stride, num_quads, x, ldx, column, use);
}

}  // namespace

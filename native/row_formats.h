// Vectors of keys and values as bytes, one instruction set at a time; kv/codecs/ holds the readable twins.
#pragma once

#include "simd.h"
#include "types.h"

namespace {

using elbowroom::RowFormat;
using elbowroom::RowKind;

typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef int16_t vw __attribute__((vector_size(W * 4)));
typedef uint8_t vub __attribute__((vector_size(W)));
typedef int8_t vsb __attribute__((vector_size(W)));
typedef int8_t vsb2 __attribute__((vector_size(W * 2)));

inline vi widen_bytes(const uint8_t* p) {
#if defined(__AVX512F__) && ELBOWROOM_WIDTH == 16
    return bit_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && ELBOWROOM_WIDTH == 8
    return bit_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(load<vub>(p), vi);
#endif
}

inline vi widen_bytes(const int8_t* p) {
#if defined(__AVX512F__) && ELBOWROOM_WIDTH == 16
    return bit_cast<vi>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && ELBOWROOM_WIDTH == 8
    return bit_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(load<vsb>(p), vi);
#endif
}

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// 2^exponent for -252 .. 254, subnormal results included.
inline float power_of_two(int exponent) {
    if (exponent > -127 && exponent < 128) return bit_cast<float>(uint32_t(exponent + 127) << 23);
    const int half = exponent / 2;
    return bit_cast<float>(uint32_t(half + 127) << 23) * bit_cast<float>(uint32_t(exponent - half + 127) << 23);
}

// Codes 0x7f and 0xff are NaN; a shifted code lacks 120 in its exponent, subnormals included.
inline vf fp8_to_float(vi code) {
    const vi magnitude = code & 0x7f;
    const vf x = bit_cast<vf>(((code & 0x80) << 24) | (magnitude << 20)) * 0x1p120f;
    return magnitude == 0x7f ? splat(__builtin_nanf("")) : x;
}

// --- reading -----------------------------------------------------------------------------------------------------------

// Calls out(i, codes i .. i + W - 1, how many of them there are).
template <class Byte, class F>
inline void each_byte(const char* codes, int64_t count, F&& out) {
    const Byte* bytes = reinterpret_cast<const Byte*>(codes);
    int64_t i = 0;
    for (; i + W <= count; i += W) out(i, widen_bytes(bytes + i), int64_t{W});
    if (i == count) return;
    Byte tail[W] = {};
    __builtin_memcpy(tail, bytes + i, count - i);
    out(i, widen_bytes(tail), count - i);
}

inline void put(float* target, vf x, int64_t count) {
    if (count == W) {
        store(target, x);
    } else {
        for (int64_t i = 0; i < count; ++i) target[i] = x[i];
    }
}

inline void decode_int8(const char* codes, const char* scales, int64_t width, float* out) {
    bf16 stored;
    __builtin_memcpy(&stored, scales, sizeof stored);
    const float scale = widen_one(stored);
    each_byte<int8_t>(codes, width, [&](int64_t i, vi code, int64_t count) { put(out + i, to_float(code) * scale, count); });
}

inline void decode_fp8(const char* codes, int64_t width, float* out) {
    each_byte<uint8_t>(codes, width, [&](int64_t i, vi code, int64_t count) { put(out + i, fp8_to_float(code), count); });
}

template <int Bits>
inline void decode_bfp(const char* codes, const char* exponents, int64_t width, int64_t block, float* out) {
    for (int64_t first = 0; first < width; first += block, out += block, codes += block * Bits / 8) {
        const int exponent = *reinterpret_cast<const int8_t*>(exponents++);
        const float scale = exponent == -128 ? __builtin_nanf("") : power_of_two(exponent - (Bits - 2));
        if constexpr (Bits == 8) {
            each_byte<int8_t>(codes, block, [&](int64_t i, vi code, int64_t count) {
                put(out + i, to_float(code) * scale, count);
            });
        } else {
            const int64_t half = block / 2;
            each_byte<uint8_t>(codes, half, [&](int64_t i, vi code, int64_t count) {
                put(out + i, to_float((code & 15) - 8) * scale, count);
                put(out + half + i, to_float((code >> 4) - 8) * scale, count);
            });
        }
    }
}

inline void decode_planes(const RowFormat& format, const char* high, const char* scales, int64_t width, float* out) {
    const char* low = high + format.low_at(width);
    const int64_t half = format.block / 2;
    for (int64_t first = 0; first < width; first += format.block, out += format.block, high += half, low += half) {
        f16 scale, minimum;
        __builtin_memcpy(&scale, scales, sizeof scale);
        __builtin_memcpy(&minimum, scales + format.number_stride(), sizeof minimum);
        scales += 2 * format.number_stride();
        for (int64_t i = 0; i < half; ++i) {
            const int above = uint8_t(high[i]), below = uint8_t(low[i]);
            out[i] = widen_one(minimum) + widen_one(scale) * float((above & 15) << 4 | (below & 15));
            out[half + i] = widen_one(minimum) + widen_one(scale) * float((above >> 4) << 4 | below >> 4);
        }
    }
}

// `count` vectors that lie one behind the other -> rows of `stride` floats.
void decode_rows(const RowFormat& format, const char* codes, const char* scales, int64_t width, int64_t count, float* out,
                 int64_t stride) {
    const int64_t code_stride = format.code_stride(width), scale_stride = format.scale_stride(width);
    for (int64_t r = 0; r < count; ++r, codes += code_stride, scales += scale_stride, out += stride) {
        switch (format.kind) {
            case RowKind::int8: decode_int8(codes, scales, width, out); break;
            case RowKind::fp8: decode_fp8(codes, width, out); break;
            case RowKind::bfp:
                format.bits == 8 ? decode_bfp<8>(codes, scales, width, format.block, out)
                                 : decode_bfp<4>(codes, scales, width, format.block, out);
                break;
            case RowKind::planes: decode_planes(format, codes, scales, width, out); break;
            default: break;
        }
    }
}

constexpr float kFp8Unit = 256.0f;

// Codes -> numbers of float16 that are kFp8Unit times too small, 2 * W at a time: only the bits move, and one behind the
// largest number (code 0x7f: NaN) the carry fills the exponent. `out` takes whole vectors.
inline void fp8_to_halves(const char* codes, int64_t count, f16* out) {
    const auto halves = [](vsb2 code) {
        const vw number = __builtin_convertvector(code, vw) << 7 & int16_t(0xbf80);
        return number | ((number + 0x80) & 0x4000);
    };
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) store(out + i, halves(load<vsb2>(codes + i)));
    if (i == count) return;
    vsb2 rest{};
    __builtin_memcpy(&rest, codes + i, count - i);
    store(out + i, halves(rest));
}

// --- writing: a token at a time, so nothing here is worth vectors ------------------------------------------------------

inline float largest(const float* x, int64_t count) {
    float most = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float magnitude = __builtin_fabsf(x[i]);
        most = magnitude <= most || most != most ? most : magnitude;  // NaN is the largest
    }
    return most;
}

inline float clamp(float x, float most) { return x > most ? most : x < -most ? -most : x; }

// The float16 next to x that is not below it, and the one that is not above it.
inline f16 round_up(float x) {
    f16 near;
    narrow(x, &near);
    if (widen_one(near) < x) near.bits = uint16_t(near.bits & 0x8000u ? near.bits - 1 : near.bits + 1);
    return near;
}

inline f16 round_down(float x) {
    f16 near = round_up(-x);
    near.bits ^= 0x8000u;
    return near;
}

inline void encode_int8(const float* x, int64_t width, char* codes, char* scales) {
    const float least = largest(x, width) / 127.0f;
    bf16 scale;
    narrow(least, &scale);
    if (widen_one(scale) < least) ++scale.bits;
    const float divisor = scale.bits == 0 ? 1.0f : widen_one(scale);
    for (int64_t i = 0; i < width; ++i) {
        const float code = clamp(__builtin_rintf(x[i] / divisor), 127.0f);
        codes[i] = char(code == code ? int8_t(code) : int8_t{0});
    }
    __builtin_memcpy(scales, &scale, sizeof scale);
}

inline uint8_t to_fp8(float x) {
    if (x != x) return 0x7f;
    const float magnitude = clamp(__builtin_fabsf(x), 448.0f);
    const uint8_t sign = uint8_t(bit_cast<uint32_t>(x) >> 24 & 0x80);
    // Below 2^-6 codes are multiples of 2^-9; above, three bits behind the leading one stay, rounded to even.
    if (magnitude < 0x1p-6f) return uint8_t(sign | uint8_t(__builtin_rintf(magnitude * 0x1p9f)));
    const uint32_t bits = bit_cast<uint32_t>(magnitude);
    const uint32_t rounded = (bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
    return uint8_t(sign | uint8_t(rounded - (120u << 3)));
}

inline void encode_bfp(const RowFormat& format, const float* x, int64_t width, char* codes, char* exponents) {
    const float most = float((1 << (format.bits - 1)) - 1);
    for (int64_t first = 0; first < width; first += format.block, x += format.block) {
        const float top = largest(x, format.block);
        int exponent = -127;
        if (top > 0) {
            __builtin_frexpf(top, &exponent);
            exponent = exponent - 1 < -127 ? -127 : exponent - 1;
        }
        const bool finite = top - top == 0;
        *exponents++ = char(int8_t(finite ? exponent : -128));
        // Two factors, as one may lie outside the range of a float.
        const int shift = format.bits - 2 - exponent, half = shift / 2;
        const float low = power_of_two(half), high = power_of_two(shift - half);
        const auto mantissa = [&](int64_t i) { return finite ? int(clamp(__builtin_rintf(x[i] * low * high), most)) : 0; };
        if (format.bits == 8) {
            for (int64_t i = 0; i < format.block; ++i) *codes++ = char(int8_t(mantissa(i)));
            continue;
        }
        const int64_t pairs = format.block / 2;
        for (int64_t i = 0; i < pairs; ++i) *codes++ = char((mantissa(i) + 8) | (mantissa(i + pairs) + 8) << 4);
    }
}

inline void encode_planes(const RowFormat& format, const float* x, int64_t width, char* high, char* scales) {
    char* low = high + format.low_at(width);
    const int64_t half = format.block / 2;
    for (int64_t first = 0; first < width; first += format.block, x += format.block) {
        float least = *x, greatest = *x;  // NaN where one is
        for (int64_t i = 1; i < format.block; ++i) {
            least = x[i] >= least || least != least ? least : x[i];
            greatest = x[i] <= greatest || greatest != greatest ? greatest : x[i];
        }
        const f16 minimum = round_down(least), scale = round_up((greatest - widen_one(minimum)) / 255.0f);
        __builtin_memcpy(scales, &scale, sizeof scale);
        __builtin_memcpy(scales + format.number_stride(), &minimum, sizeof minimum);
        scales += 2 * format.number_stride();
        const float divisor = widen_one(scale) == 0 ? 1.0f : widen_one(scale);
        const auto code = [&](int64_t i) {
            const float number = __builtin_rintf((x[i] - widen_one(minimum)) / divisor);
            return number > 0 ? int(number < 255.0f ? number : 255.0f) : 0;  // NaN: 0, scale or minimum says so
        };
        for (int64_t i = 0; i < half; ++i) {
            const int first_code = code(i), second = code(half + i);
            *high++ = char(first_code >> 4 | (second >> 4) << 4);
            *low++ = char((first_code & 15) | (second & 15) << 4);
        }
    }
}

void encode_row(const RowFormat& format, const float* x, int64_t width, char* codes, char* scales) {
    switch (format.kind) {
        case RowKind::int8: return encode_int8(x, width, codes, scales);
        case RowKind::fp8:
            for (int64_t i = 0; i < width; ++i) codes[i] = char(to_fp8(x[i]));
            return;
        case RowKind::bfp: return encode_bfp(format, x, width, codes, scales);
        case RowKind::planes: return encode_planes(format, x, width, codes, scales);
        default: return;
    }
}

}  // namespace

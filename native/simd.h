// Vectors as wide as the instruction set that this file is compiled for, by the compilers' vector extensions.
//
// Everything has internal linkage and no standard function is used: a function compiled for AVX-512 must never be the
// copy that the linker keeps for all.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

namespace {

using elbowroom::DType;

// The one place that says how wide vectors are. To run wide code on a narrower CPU, compile it for that CPU with
// -DELBOWROOM_WIDTH=16: the compiler splits the vectors (CMake: ELBOWROOM_EMULATE; instruction set "emulated512"). So an
// intrinsic needs a plain version beside it, chosen by ELBOWROOM_WIDTH and by what the compiler may emit.
#if !defined(ELBOWROOM_WIDTH)
#if defined(__AVX512F__)
#define ELBOWROOM_WIDTH 16
#elif defined(__AVX2__)
#define ELBOWROOM_WIDTH 8
#else
#define ELBOWROOM_WIDTH 4
#endif
#endif
constexpr int W = ELBOWROOM_WIDTH;

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <class V, class T>
inline V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
inline void store(T* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

using Lanes = std::make_integer_sequence<int, W>;

// Not `vf{} + x`: adding to zero changes -0.0, so it would cost an instruction.
template <int... I>
inline vf splat_lanes(float x, std::integer_sequence<int, I...>) {
    return vf{(void(I), x)...};
}

inline vf splat(float x) { return splat_lanes(x, Lanes{}); }

inline vf vmax(vf a, vf b) { return a > b ? a : b; }

// Holds a loaded vector in a register: GCC would load it again for every product that uses it, and loads are what
// the loops below run short of.
inline void keep(vf& v) {
#if ELBOWROOM_WIDTH == 16 && !defined(__AVX512F__)
    (void)v;  // emulated: a vector is several registers
#elif defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// --- conversions -----------------------------------------------------------------------------------------------------

inline vf widen(const float* p) { return load<vf>(p); }

inline vu widen_bits(const uint16_t* p) {
    // Compilers turn the conversion of a whole vector into two halves and five instructions.
#if defined(__AVX512F__) && ELBOWROOM_WIDTH == 16
    return bit_cast<vu>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && ELBOWROOM_WIDTH == 8
    return bit_cast<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(load<vh>(p), vu);
#endif
}

inline vf widen(const bf16* p) { return bit_cast<vf>(widen_bits(&p->bits) << 16); }

inline vf widen(const f16* p) {
#if defined(__AVX512F__) && ELBOWROOM_WIDTH == 16
    return bit_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && ELBOWROOM_WIDTH == 8
    return bit_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    // Moving exponent and mantissa into place and multiplying by 2^112 is exact, subnormals included.
    const vu h = __builtin_convertvector(load<vh>(p), vu);
    const vf small = bit_cast<vf>((h & 0x7fffu) << 13) * 0x1p112f;
    const vu special = bit_cast<vu>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return bit_cast<vf>(bit_cast<vu>(small) | special | ((h & 0x8000u) << 16));
#endif
}

inline float widen_one(float x) { return x; }

inline float widen_one(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

inline float widen_one(f16 x) {
    const uint32_t h = x.bits;
    const uint32_t bits = bit_cast<uint32_t>(bit_cast<float>((h & 0x7fffu) << 13) * 0x1p112f);
    return bit_cast<float>(bits | ((h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u) | ((h & 0x8000u) << 16));
}

inline void narrow(float x, float* p) { *p = x; }

inline void narrow(float x, bf16* p) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    p->bits = uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float x, f16* p) {
#if defined(__F16C__)
    p->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 65536 and above; 65520 .. 65536 round up to infinity below
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded half in the last bits
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    p->bits = uint16_t(sign | half);
#endif
}

// 2 * W stored values as two vectors, in the order that takes the fewest instructions: values of bfloat16 come with
// even places in the first and odd ones in the second (`deinterleave` lays out the other factor alike).
inline vf widen_first(const float* p) { return load<vf>(p); }
inline vf widen_second(const float* p) { return load<vf>(p + W); }
inline vf widen_first(const f16* p) { return widen(p); }
inline vf widen_second(const f16* p) { return widen(p + W); }
inline vf widen_first(const bf16* p) { return bit_cast<vf>(load<vu>(p) << 16); }
inline vf widen_second(const bf16* p) { return bit_cast<vf>(load<vu>(p) & 0xffff0000u); }

// Elements offset .. offset + W - 1 of a row of `count`; zeros beyond its end.
template <class T>
inline vf widen_padded(const T* row, int64_t offset, int64_t count) {
    if (offset + W <= count) return widen(row + offset);
    float lanes[W] = {};
    for (int64_t i = offset; i < count; ++i) lanes[i - offset] = widen_one(row[i]);
    return load<vf>(lanes);
}

// f(a null pointer to the storage type).
template <class F>
inline void with_type(DType dtype, F&& f) {
    switch (dtype) {
        case DType::float32: return f(static_cast<const float*>(nullptr));
        case DType::bfloat16: return f(static_cast<const bf16*>(nullptr));
        case DType::float16: return f(static_cast<const f16*>(nullptr));
    }
}

// The lowest byte of each lane.
inline void store_bytes(int8_t* p, vu x) {
#if defined(__AVX512F__) && ELBOWROOM_WIDTH == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bit_cast<__m512i>(x)));
#elif defined(__AVX2__) && ELBOWROOM_WIDTH == 8
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                           -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(bit_cast<__m256i>(x), order);
    store(p, uint32_t(_mm256_extract_epi32(bytes, 0)));
    store(p + 4, uint32_t(_mm256_extract_epi32(bytes, 4)));
#else
    for (int i = 0; i < W; ++i) p[i] = int8_t(x[i]);
#endif
}

// --- lanes -----------------------------------------------------------------------------------------------------------

template <int Step, int... I>
inline vf even_blocks(vf a, vf b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & Step) ? W + I - Step : I)...);
}

template <int Step, int... I>
inline vf odd_blocks(vf a, vf b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & Step) ? W + I : I + Step)...);
}

template <int... I>
inline void deinterleave_lanes(vf& a, vf& b, std::integer_sequence<int, I...>) {
    const vf even = __builtin_shufflevector(a, b, (2 * I)...);
    b = __builtin_shufflevector(a, b, (2 * I + 1)...);
    a = even;
}

// The 2 * W values of (a, b): those of even places into a, those of odd places into b.
inline void deinterleave(vf& a, vf& b) { deinterleave_lanes(a, b, Lanes{}); }

template <int... I>
inline void interleave_lanes(vf& a, vf& b, std::integer_sequence<int, I...>) {
    const vf low = __builtin_shufflevector(a, b, ((I & 1) ? W + I / 2 : I / 2)...);
    b = __builtin_shufflevector(a, b, ((I & 1) ? W + (W + I) / 2 : (W + I) / 2)...);
    a = low;
}

// The way back.
inline void interleave(vf& a, vf& b) { interleave_lanes(a, b, Lanes{}); }

// Transposes W x W in place: each stage swaps the off-diagonal blocks of size Step.
template <int Step = W / 2>
inline void transpose(vf (&rows)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        if (i & Step) continue;
        const vf low = even_blocks<Step>(rows[i], rows[i + Step], Lanes{});
        rows[i + Step] = odd_blocks<Step>(rows[i], rows[i + Step], Lanes{});
        rows[i] = low;
    }
    if constexpr (Step > 1) transpose<Step / 2>(rows);
}

// Lane j of the result is the sum of the lanes of rows[j]: a transposition that adds instead of swapping.
template <int Step = W / 2>
inline vf sum_each(vf (&rows)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < Step; ++i) {
        rows[i] = even_blocks<Step>(rows[i], rows[i + Step], Lanes{}) +
                  odd_blocks<Step>(rows[i], rows[i + Step], Lanes{});
    }
    if constexpr (Step > 1) return sum_each<Step / 2>(rows);
    return rows[0];
}

template <int Step, int... I>
inline vf swap_blocks(vf v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ Step)...);
}

// The greatest lane; NaN where one is NaN.
template <int Step = W / 2>
inline float max_lane(vf v) {
    const vf other = swap_blocks<Step>(v, Lanes{});
    v = other <= v ? v : v != v ? v : other;
    if constexpr (Step > 1) return max_lane<Step / 2>(v);
    return v[0];
}

template <int Step = W / 2>
inline float sum_lanes(vf v) {
    v += swap_blocks<Step>(v, Lanes{});
    if constexpr (Step > 1) return sum_lanes<Step / 2>(v);
    return v[0];
}

// --- exponential -----------------------------------------------------------------------------------------------------

// e^x to about 1e-7 relative for x <= 88; exactly 0 below -87.3 (where results would be subnormal) and for -inf.
inline vf vexp(vf x) {
    const vf clamped = x < -87.3f ? splat(-87.3f) : x;
    const vf shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold round(x / ln 2)
    const vf n = shifted - 12582912.0f;
    const vf r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
    vf y = r * 1.98756915e-4f + 1.39819995e-3f;
    y = y * r + 8.33345191e-3f;
    y = y * r + 4.16657960e-2f;
    y = y * r + 1.66666655e-1f;
    y = y * r + 5.00000012e-1f;
    y = y * (r * r) + (r + 1.0f);
    const vf power = bit_cast<vf>((bit_cast<vu>(shifted) + 127u) << 23);
    return x < -87.3f ? vf{} : y * power;
}

// The same for x <= 0, to about 1e-4 relative: enough for weights that are rounded to 8 bits.
inline vf vexp_coarse(vf x) {
    const vf clamped = x < -87.0f ? splat(-87.0f) : x;  // NaN stays
    const vf shifted = clamped * 1.44269504f + 12582912.0f;
    const vf r = clamped - (shifted - 12582912.0f) * 0.693147181f;
    const vf y = ((r * 0.16566635f + 0.50496031f) * r + 1.00016416f) * r + 0.99992816f;
    const vf power = bit_cast<vf>((bit_cast<vu>(shifted) + 127u) << 23);
    return y * power;
}

inline float exp_one(float x) { return vexp(splat(x))[0]; }

inline vf vtanh(vf x) { return 1.0f - 2.0f / (vexp(vmax(splat(-20.0f), -vmax(splat(-20.0f), -x)) * 2.0f) + 1.0f); }

}  // namespace

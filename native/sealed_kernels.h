// Attention on sealed strips (codec kivi), one instruction set at a time: integer products of the packed codes.
//
// Scales are folded into the other factor, which is rounded to signed bytes for each strip: queries times the scales of
// their channels, weights times the scales of their tokens. What rounding leaves over is multiplied with the mean code
// and added, so only deviations from it see the rounded factor. Nothing is decoded.
#pragma once

#include "kernels.h"
#include "quad_kernels.h"
#include "simd.h"
#include "strip_softmax.h"

namespace {

using elbowroom::kSealedRows;
using elbowroom::kStripTokens;
using elbowroom::SealedHead;
using elbowroom::Strips;

struct Rounded {
    float scale, rest;
};

// factor[i] = scale * bytes[i] + rest[i]; returns the scale and the sum of all rest[i]. Values behind the last one, up to a
// whole vector, must be 0.
inline Rounded round_to_bytes(const float* factor, int64_t count, int32_t* quads) {
    vf top{};
    for (int64_t i = 0; i < count; i += W) {
        const vf x = load<vf>(factor + i);
        top = vmax(top, vmax(x, -x));
    }
    const float most = max_lane(top), scale = most / 127.0f;
    const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;  // below, the inverse would be infinite
    vf rest{};
    int8_t* bytes = reinterpret_cast<int8_t*>(quads);
    for (int64_t i = 0; i < count; i += W) {
        const vf x = load<vf>(factor + i);
        const vf shifted = x * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to even, and the low bits hold the integer
        rest += x - (shifted - 12582912.0f) * scale;
        store_bytes(bytes + i, bit_cast<vu>(shifted));
    }
    return {scale, sum_lanes(rest)};
}

// Float16 numbers, zeros behind their end.
inline void widen_halves(const char* source, int64_t count, float* target) {
    const f16* halves = reinterpret_cast<const f16*>(source);
    for (int64_t i = 0; i < count; i += W) store(target + i, widen_padded(halves, i, count));
}

// Up to kSealedRows query vectors against one strip.
class SealedStrip {
   public:
    // `next` is what will be read next, or null.
    SealedStrip(const Strips& strips, const char* data, const char* next, float softcap, const uint8_t* counts)
        : head_(strips.head()), width_(elbowroom::sealed_width(strips)), data_(data), next_(next), softcap_(softcap),
          counts_(counts) {}

    // Vector m reads the slots low[m] .. high[m] - 1; scratch as `sealed_floats` says.
    void attend(const Gathered& rows, int64_t first, int64_t count, const int64_t* low, const int64_t* high,
                float* scratch) {
        scales_ = scratch;
        minima_ = scales_ + width_;
        folded_ = minima_ + width_;
        scores_ = folded_ + width_;
        products_ = reinterpret_cast<int32_t*>(scores_ + kSealedRows * kStripTokens);
        quads_ = products_ + kSealedRows * width_;
        score(rows, first, count);
        for (int64_t m = 0; m < count; ++m) {
            const StripSum sum = weigh_strip(scores_ + m * kStripTokens, low[m], high[m], softcap_, counts_);
            share_[m] = merge_strip(rows, first + m, sum);
        }
        gather(rows, first, count);
    }

   private:
    template <class F>
    static void with_bits(int bits, F&& f) {
        bits == 2 ? f(std::integral_constant<int, 2>{}) : f(std::integral_constant<int, 4>{});
    }
    static float mean_code(int bits) { return 0.5f * float((1 << bits) - 1); }

    // One of `parts` pieces of the next strip, between the arithmetic: all at once would wait for each other.
    void prefetch_some(int64_t parts) {
        if (next_ == nullptr) return;
        const char* end = next_ + (head_.bytes() + parts - 1) / parts;
        for (; next_ < end; next_ += 64) __builtin_prefetch(next_, 0, 2);
    }

    // scores = q . keys, one group of tokens after the other.
    void score(const Gathered& rows, int64_t first, int64_t count) {
        const int64_t channels = head_.channels(), ldq = width_ / 4;
        for (int64_t group = 0; group < head_.key_groups(); ++group) {
            widen_halves(data_ + head_.key_scales() + group * channels * 2, channels, scales_);
            widen_halves(data_ + head_.key_minima() + group * channels * 2, channels, minima_);
            float scale[kSealedRows], offset[kSealedRows];
            for (int64_t m = 0; m < count; ++m) {
                prefetch_some(2 * count * head_.key_groups());
                const float* q = rows.q + (first + m) * rows.ldk;
                vf minima{};
                for (int64_t d = 0; d < channels; d += W) {
                    const vf x = load<vf>(q + d);
                    minima += x * load<vf>(minima_ + d);
                    store(folded_ + d, x * load<vf>(scales_ + d));
                }
                const Rounded rounded = round_to_bytes(folded_, channels, quads_ + m * ldq);
                scale[m] = rounded.scale;
                offset[m] = sum_lanes(minima) + mean_code(head_.key_bits) * rounded.rest;
            }
            const int64_t begin = group * head_.group, groups = head_.group / kGroupOutputs;
            with_bits(head_.key_bits, [&](auto bits) {
                const char* codes = data_ + begin / kGroupOutputs * group_bytes(bits);
                multiply_codes<bits>(count, reinterpret_cast<const uint8_t*>(codes), head_.key_quad_bytes(),
                                     head_.key_quads(), groups, quads_, ldq, products_, head_.group);
            });
            for (int64_t m = 0; m < count; ++m) {
                for (int64_t t = 0; t < head_.group; t += W) {
                    const vf sums = __builtin_convertvector(load<vi>(products_ + m * head_.group + t), vf);
                    store(scores_ + m * kStripTokens + begin + t, sums * scale[m] + offset[m]);
                }
            }
        }
    }

    // out += weights . values, one group of channels after the other.
    void gather(const Gathered& rows, int64_t first, int64_t count) {
        const int64_t ldq = width_ / 4, ldp = width_;
        for (int64_t group = 0; group < head_.value_groups(); ++group) {
            widen_halves(data_ + head_.value_scales() + group * kStripTokens * 2, kStripTokens, scales_);
            widen_halves(data_ + head_.value_minima() + group * kStripTokens * 2, kStripTokens, minima_);
            float scale[kSealedRows], offset[kSealedRows];
            for (int64_t m = 0; m < count; ++m) {
                prefetch_some(2 * count * head_.value_groups());
                const float* weights = scores_ + m * kStripTokens;
                vf minima{};
                for (int64_t t = 0; t < kStripTokens; t += W) {
                    const vf x = load<vf>(weights + t);
                    minima += x * load<vf>(minima_ + t);
                    store(folded_ + t, x * load<vf>(scales_ + t));
                }
                const Rounded rounded = round_to_bytes(folded_, kStripTokens, quads_ + m * ldq);
                scale[m] = rounded.scale * share_[m];
                offset[m] = (sum_lanes(minima) + mean_code(head_.value_bits) * rounded.rest) * share_[m];
            }
            const int64_t begin = group * head_.group, width = min(head_.group, head_.v_head_dim - begin);
            const int64_t groups = (width + kGroupOutputs - 1) / kGroupOutputs;
            with_bits(head_.value_bits, [&](auto bits) {
                const char* codes = data_ + head_.values() + begin / kGroupOutputs * group_bytes(bits);
                multiply_codes<bits>(count, reinterpret_cast<const uint8_t*>(codes), head_.value_quad_bytes(),
                                     kStripTokens / kQuad, groups, quads_, ldq, products_, ldp);
            });
            for (int64_t m = 0; m < count; ++m) {
                float* out = rows.out + (first + m) * rows.ldv + begin;
                for (int64_t d = 0; d < groups * kGroupOutputs && begin + d < rows.ldv; d += W) {
                    const vf sums = __builtin_convertvector(load<vi>(products_ + m * ldp + d), vf);
                    store(out + d, load<vf>(out + d) + (sums * scale[m] + offset[m]));
                }
            }
        }
    }

    const SealedHead head_;
    const int64_t width_;
    const char *data_, *next_;
    float softcap_;
    const uint8_t* counts_;
    float *scales_, *minima_, *folded_, *scores_;
    int32_t *products_, *quads_;
    float share_[kSealedRows];
};

// --- sealing -----------------------------------------------------------------------------------------------------------

struct Affine {
    f16 scale, minimum;
};

// The scale and minimum of `levels` codes above 0 for values low .. high.
inline Affine affine(float low, float high, float levels) {
    Affine found;
    narrow(low, &found.minimum);
    narrow((high - low) / levels, &found.scale);
    return found;
}

inline uint8_t affine_code(float x, Affine by, float levels) {
    const float scale = widen_one(by.scale), divisor = scale == 0 ? 1.0f : scale;
    const float code = __builtin_rintf((x - widen_one(by.minimum)) / divisor);
    return code > 0 ? uint8_t(code < levels ? code : levels) : uint8_t{0};  // NaN: 0, its scale or minimum says so
}

// The least and the greatest of `count` values; NaN where one is not finite.
inline void find_range(const float* x, int64_t stride, int64_t count, float* low, float* high) {
    float poison = 0;
    *low = *high = *x;
    for (int64_t i = 0; i < count; ++i, x += stride) {
        *low = *x < *low ? *x : *low;
        *high = *x > *high ? *x : *high;
        poison += *x * 0.0f;
    }
    *low += poison;
}

// codes [contraction 4][outputs] of one quad -> its groups of 128.
template <int Bits>
inline void pack_quad(const uint8_t* codes, int64_t outputs, uint8_t* target) {
    for (int64_t first = 0; first < outputs; first += kGroupOutputs, target += group_bytes(Bits)) {
        uint8_t group[kQuad * kGroupOutputs];
        for (int i = 0; i < kQuad * kGroupOutputs; ++i) group[i] = codes[i % kQuad * outputs + first + i / kQuad];
        pack_group<Bits>(group, target);
    }
}

// Keys [64][head_dim] in float32: a scale for each channel and group of tokens.
template <int Bits>
void seal_keys(const SealedHead& head, const float* keys, char* target) {
    const float levels = float((1 << Bits) - 1);
    f16* scales = reinterpret_cast<f16*>(target + head.key_scales());
    f16* minima = reinterpret_cast<f16*>(target + head.key_minima());
    for (int64_t quad = 0; quad < head.key_quads(); ++quad) {
        uint8_t codes[kQuad * kStripTokens] = {};
        for (int64_t c = 0; c < kQuad; ++c) {
            const int64_t channel = quad * kQuad + c;
            for (int64_t group = 0; group < head.key_groups(); ++group) {
                Affine by{};
                if (channel < head.head_dim) {
                    const float* first = keys + group * head.group * head.head_dim + channel;
                    float low, high;
                    find_range(first, head.head_dim, head.group, &low, &high);
                    by = affine(low, high, levels);
                    uint8_t* out = codes + c * kStripTokens + group * head.group;
                    for (int64_t t = 0; t < head.group; ++t) out[t] = affine_code(first[t * head.head_dim], by, levels);
                }
                scales[group * head.channels() + channel] = by.scale;
                minima[group * head.channels() + channel] = by.minimum;
            }
        }
        pack_quad<Bits>(codes, kStripTokens, reinterpret_cast<uint8_t*>(target) + quad * head.key_quad_bytes());
    }
}

// Values [64][v_head_dim]: a scale for each token and group of channels.
template <int Bits>
void seal_values(const SealedHead& head, const float* values, char* target, uint8_t* codes) {
    const float levels = float((1 << Bits) - 1);
    const int64_t outputs = SealedHead::up(head.v_head_dim, kGroupOutputs);
    f16* scales = reinterpret_cast<f16*>(target + head.value_scales());
    f16* minima = reinterpret_cast<f16*>(target + head.value_minima());
    uint8_t* packed = reinterpret_cast<uint8_t*>(target + head.values());
    for (int64_t t = 0; t < kStripTokens; ++t) {
        uint8_t* row = codes + t % kQuad * outputs;
        for (int64_t i = head.v_head_dim; i < outputs; ++i) row[i] = 0;
        for (int64_t group = 0; group < head.value_groups(); ++group) {
            const int64_t begin = group * head.group, end = min(begin + head.group, head.v_head_dim);
            const float* x = values + t * head.v_head_dim;
            float low, high;
            find_range(x + begin, 1, end - begin, &low, &high);
            const Affine by = affine(low, high, levels);
            for (int64_t d = begin; d < end; ++d) row[d] = affine_code(x[d], by, levels);
            scales[group * kStripTokens + t] = by.scale;
            minima[group * kStripTokens + t] = by.minimum;
        }
        if (t % kQuad == kQuad - 1) pack_quad<Bits>(codes, outputs, packed + t / kQuad * head.value_quad_bytes());
    }
}

// Floats of scratch: a head's keys or values, and the codes of a quad of values.
void seal(const SealedHead& head, const char* keys, const char* values, DType dtype, char* target, float* scratch) {
    widen_row(keys, dtype, scratch, kStripTokens * head.head_dim);
    head.key_bits == 2 ? seal_keys<2>(head, scratch, target) : seal_keys<4>(head, scratch, target);
    widen_row(values, dtype, scratch, kStripTokens * head.v_head_dim);
    uint8_t* codes = reinterpret_cast<uint8_t*>(scratch + kStripTokens * head.v_head_dim);
    head.value_bits == 2 ? seal_values<2>(head, scratch, target, codes) : seal_values<4>(head, scratch, target, codes);
}

}  // namespace

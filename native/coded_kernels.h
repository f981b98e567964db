// Attention on strips of integer codes that lie token by token (codecs int8, bfp, planes), one instruction set at a time.
//
// A strip is laid out in quads once for all query vectors (see code_quads.h); then q . K and p . V are products of
// integers, with one multiplication by scales for each block of channels that shares one. Queries are rounded once,
// weights (with the scales of their tokens) once for each strip: to 16 bits against codes of 8, to 8 bits against codes
// of 4. A row's result depends on nothing but its own query and what it reads.
#pragma once

#include "code_quads.h"
#include "kernels.h"
#include "strip_softmax.h"

namespace {

using elbowroom::CodedSizes;
using elbowroom::kSealedRows;
using elbowroom::RowFormat;
using elbowroom::RowKind;
using elbowroom::Strips;

// The scales of 64 vectors -> scales[block * 64 + token]; those of bfp lack 2^(2 - bits). What is not finite gives NaN in
// products with any integer.
inline void widen_scales(const RowFormat& format, const char* source, int64_t blocks, float* scales) {
    if (format.kind == RowKind::int8) {
        for (int64_t t = 0; t < kStripTokens; t += W) {
            const vf scale = widen(reinterpret_cast<const bf16*>(source) + t);
            store(scales + t, scale + scale * 0.0f);
        }
        return;
    }
    // Exponent -128 becomes the bits of infinity, its integers are 0; -127, of zeros, becomes 0.
    const auto power = [](const int8_t* exponents) { return bit_cast<vf>((widen_bytes(exponents) + 127) << 23); };
    const int8_t* exponents = reinterpret_cast<const int8_t*>(source);
    if (blocks == 2) {
        for (int64_t t = 0; t < kStripTokens; t += W) {
            vf first = power(exponents + 2 * t), second = power(exponents + 2 * t + W);
            deinterleave(first, second);
            store(scales + t, first);
            store(scales + kStripTokens + t, second);
        }
        return;
    }
    for (int64_t b = 0; b < blocks; ++b, scales += kStripTokens) {
        int8_t column[kStripTokens];
        for (int64_t t = 0; t < kStripTokens; ++t) column[t] = exponents[t * blocks + b];
        for (int64_t t = 0; t < kStripTokens; t += W) store(scales + t, power(column + t));
    }
}

// Of 64 keys in planes, scale and the key of code `zero` in each group -> scales[group * 64 + token], zeros alike. What is
// not finite gives NaN.
inline void widen_planes(const RowFormat& format, const char* source, int64_t groups, float zero, float* scales,
                         float* zeros) {
    for (int64_t g = 0; g < groups; ++g, source += 2 * format.number_stride()) {
        const f16 *first = reinterpret_cast<const f16*>(source),
                  *second = reinterpret_cast<const f16*>(source + format.number_stride());
        for (int64_t t = 0; t < kStripTokens; t += W) {
            const vf scale = widen(first + t), at_zero = widen(second + t) + scale * zero;
            store(scales + g * kStripTokens + t, scale + scale * 0.0f);
            store(zeros + g * kStripTokens + t, at_zero + at_zero * 0.0f);
        }
    }
}

// The sum of `count` numbers, zeros behind them up to whole vectors.
inline float sum_row(const float* x, int64_t count) {
    vf sums{};
    for (int64_t i = 0; i < count; i += W) sums += load<vf>(x + i);
    return sum_lanes(sums);
}

// What will be read next, fetched some lines at a time between the arithmetic: all at once would wait for each other.
class Ahead {
   public:
    void clear() { count_ = part_ = 0; }
    void add(const char* data, int64_t bytes) {
        if (count_ < kMost) runs_[count_++] = {data, data + bytes};
    }
    // Keys of a head, or one plane of them with its scales.
    void add_keys(const Strips& s, char* strip, int head, bool low) {
        add(s.keys(strip, head) + (low ? s.key.low_at(s.head_dim) : 0), kStripTokens * s.key.code_stride(s.head_dim));
        add_scales(s, strip, head);
    }
    void add_scales(const Strips& s, char* strip, int head) {
        const int64_t runs = s.planes() ? 2 * (s.head_dim / s.key.block) : 1;
        for (int64_t i = 0; i < runs; ++i) {
            add(s.key_scales(strip, head) + i * s.key.number_stride(), kStripTokens * s.key.scale_stride(s.head_dim));
        }
    }
    void add_values(const Strips& s, char* strip, int head) {
        add(s.values(strip, head), kStripTokens * s.value.code_bytes(s.v_head_dim));
        add(s.value_scales(strip, head), kStripTokens * s.value.scale_bytes(s.v_head_dim));
    }
    void fetch_some() {
        if (part_ == count_) return;
        Run& run = runs_[part_];
        for (int i = 0; i < 8 && run.data < run.end; ++i, run.data += 64) __builtin_prefetch(run.data, 0, 2);
        if (run.data >= run.end) ++part_;
    }

   private:
    static constexpr int kMost = 24;
    struct Run {
        const char *data, *end;
    };
    Run runs_[kMost];
    int count_ = 0, part_ = 0;
};

// Slots low .. high - 1; those outside the strip do not count.
struct Slots {
    int64_t low, high;
};

// Query vectors of an item against one strip after the other.
class CodedStrips {
   public:
    // Scratch as `coded_floats` says.
    CodedStrips(const Strips& strips, int head, float softcap, const Gathered& rows, int64_t vectors, float* scratch)
        : strips_(strips), head_(head), softcap_(softcap), rows_(rows), sizes_(strips) {
        key_quads_ = reinterpret_cast<int32_t*>(scratch);
        value_quads_ = key_quads_ + sizes_.key_quads;
        queries_ = value_quads_ + sizes_.value_quads;
        weights_ = queries_ + vectors * sizes_.query_words;
        key_scales_ = reinterpret_cast<float*>(weights_ + kSealedRows * sizes_.weight_words);
        value_scales_ = key_scales_ + sizes_.key_blocks * kStripTokens;
        key_zeros_ = value_scales_ + sizes_.value_blocks * kStripTokens;
        query_factors_ = reinterpret_cast<Factor*>(key_zeros_ + sizes_.key_blocks * kStripTokens);
        query_sums_ = reinterpret_cast<float*>(query_factors_ + vectors * sizes_.key_blocks);
        scores_ = query_sums_ + vectors * sizes_.key_blocks;
    }

    // Rounds what stands in the rows of queries now.
    void load_queries(int64_t vectors) {
        with_bits(strips_.key.bits, [&](auto bits) {
            for (int64_t m = 0; m < vectors; ++m) load_query<bits>(m);
        });
    }

    // Lays out a strip; `next` is what will be read then, or null.
    void open(char* strip, char* next) {
        open_values(strip, nullptr);
        open_keys(strip);
        counts_ = strips_.counts(strip, head_);
        if (next == nullptr) return;
        ahead_.add_keys(strips_, next, head_, false);
        if (strips_.planes()) ahead_.add_keys(strips_, next, head_, true);
        ahead_.add_values(strips_, next, head_);
    }

    // The same of values alone, for scores that are known.
    void open_values(char* strip, char* next) {
        with_bits(strips_.value.bits, [&](auto bits) {
            value_quads<bits>(strips_.values(strip, head_), strips_.value.code_bytes(rows_.Dv), value_block(),
                              sizes_.value_stride, value_quads_);
        });
        widen_scales(strips_.value, strips_.value_scales(strip, head_), sizes_.value_blocks, value_scales_);
        ahead_.clear();
        if (next != nullptr) ahead_.add_values(strips_, next, head_);
    }

    // Puts what the vectors gathered into the order of channels.
    void finish(int64_t vectors) const {
        if (strips_.value.bits != 8) return;
        for (int64_t m = 0; m < vectors; ++m) {
            for (int64_t b = 0; b < sizes_.value_blocks; ++b) {
                order_columns(rows_.out + m * rows_.ldv + b * value_block(), value_block());
            }
        }
    }

    // All vectors; vector m reads the slots seen(m) of the strip.
    template <class F>
    void attend(int64_t vectors, F&& seen) {
        for (int64_t first = 0; first < vectors; first += kSealedRows) {
            const int64_t count = min(kSealedRows, vectors - first);
            Slots slots[kSealedRows];
            bool any = false;
            for (int64_t m = 0; m < count; ++m) {
                slots[m] = seen(first + m);
                any |= slots[m].low < kStripTokens && slots[m].high > max(0, slots[m].low);
            }
            if (!any) continue;
            with_bits(strips_.key.bits, [&](auto bits) { score<bits>(first, count); });
            weigh_few(first, count, slots);
        }
    }

    // All vectors, whose weights [vectors][64] are known, each with its share.
    void gather_weights(int64_t vectors, const float* weights, const elbowroom::BlockSum* sums) {
        for (int64_t first = 0; first < vectors; first += kSealedRows) {
            const int64_t count = min(kSealedRows, vectors - first);
            float share[kSealedRows];
            for (int64_t m = 0; m < count; ++m) share[m] = sums[first + m].share;
            with_bits(strips_.value.bits, [&](auto bits) {
                gather<bits>(first, count, share, weights + first * kStripTokens);
            });
        }
    }

   private:
    void open_keys(char* strip) {
        const char* keys = strips_.keys(strip, head_);
        const int64_t row_bytes = strips_.key.code_stride(rows_.Dk);
        if (strips_.planes()) {
            plane_quads(keys, keys + strips_.key.low_at(rows_.Dk), row_bytes, key_quads_);
            return widen_planes(strips_.key, strips_.key_scales(strip, head_), sizes_.key_blocks, 128.0f, key_scales_,
                                key_zeros_);
        }
        with_bits(strips_.key.bits, [&](auto bits) { key_quads<bits>(keys, row_bytes, key_quads_); });
        widen_scales(strips_.key, strips_.key_scales(strip, head_), sizes_.key_blocks, key_scales_);
    }

    // Scores of some vectors become weights, which gather values.
    void weigh_few(int64_t first, int64_t count, const Slots* slots) {
        float share[kSealedRows];
        for (int64_t m = 0; m < count; ++m) {
            const StripSum sum = weigh_strip(scores_ + m * kStripTokens, slots[m].low, slots[m].high, softcap_, counts_);
            share[m] = merge_strip(rows_, first + m, sum);
        }
        with_bits(strips_.value.bits, [&](auto bits) { gather<bits>(first, count, share, scores_); });
    }

    template <class F>
    static void with_bits(int bits, F&& f) {
        bits == 8 ? f(std::integral_constant<int, 8>{}) : f(std::integral_constant<int, 4>{});
    }
    // What the scales of a format lack.
    static float unit(const RowFormat& format) {
        return format.kind == RowKind::bfp ? power_of_two(2 - format.bits) : 1.0f;
    }
    // Added to codes of 4 bits.
    template <int Bits>
    static constexpr int32_t kBias = Bits == 4 ? 8 : 0;

    int64_t key_block() const { return strips_.key.block > 0 ? strips_.key.block : rows_.Dk; }
    int64_t value_block() const { return strips_.value.block > 0 ? strips_.value.block : rows_.Dv; }

    template <int Bits>
    void load_query(int64_t m) {
        const int64_t block = key_block();
        for (int64_t b = 0; b < sizes_.key_blocks; ++b) {
            int32_t* words = queries_ + m * sizes_.query_words + b * (block / 4) * kFactorWords<Bits>;
            const float* q = rows_.q + m * rows_.ldk + b * block;
            Factor factor = strips_.planes() ? round_queries<Bits, 4>(q, block, words) : round_queries<Bits>(q, block, words);
            factor.scale *= unit(strips_.key);
            query_factors_[m * sizes_.key_blocks + b] = factor;
            query_sums_[m * sizes_.key_blocks + b] = sum_row(q, block);
        }
    }

    // scores = q . keys, one block of channels after the other.
    template <int Bits>
    void score(int64_t first, int64_t count) {
        if (strips_.planes()) return score_blocks<Bits, true>(first, count);
        score_blocks<Bits, false>(first, count);
    }

    // Affine: codes stand for scale * code + zero.
    template <int Bits, bool Affine>
    void score_blocks(int64_t first, int64_t count) {
        score_block<Bits, Affine, false>(first, count, 0);
        for (int64_t b = 1; b < sizes_.key_blocks; ++b) score_block<Bits, Affine, true>(first, count, b);
    }

    template <int Bits, bool Affine, bool Add>
    void score_block(int64_t first, int64_t count, int64_t b) {
        const int64_t quads = (key_block() + 3) / 4;
        const int32_t* words = queries_ + first * sizes_.query_words + b * quads * kFactorWords<Bits>;
        const float *scales = key_scales_ + b * kStripTokens, *zeros = key_zeros_ + b * kStripTokens;
        const Factor* factors = query_factors_ + first * sizes_.key_blocks + b;
        const float* query_sums = query_sums_ + first * sizes_.key_blocks + b;
        const auto use = [&](int m, int64_t t, vi sums) __attribute__((always_inline)) {
            if (m == 0) ahead_.fetch_some();
            const Factor factor = factors[m * sizes_.key_blocks];
            vf part = to_float(sums - kBias<Bits> * factor.sum) * (load<vf>(scales + t) * factor.scale);
            if constexpr (Affine) part += load<vf>(zeros + t) * query_sums[m * sizes_.key_blocks];
            float* target = scores_ + m * kStripTokens + t;
            if constexpr (Add) {
                store(target, load<vf>(target) + part);
            } else {
                store(target, part);
            }
        };
        multiply_quads<Bits, kSealedRows>(count, key_quads_ + b * quads * kStripTokens, kStripTokens, quads, kStripTokens,
                                          words, sizes_.query_words, use);
    }

    // out += weights . values, one block of channels after the other.
    template <int Bits>
    void gather(int64_t first, int64_t count, const float* share, const float* weights) {
        const int64_t block = value_block(), width = min((block + W - 1) / W * W, rows_.ldv);
        const float lacking = unit(strips_.value);
        for (int64_t b = 0; b < sizes_.value_blocks; ++b) {
            Factor factors[kSealedRows];
            for (int64_t m = 0; m < count; ++m) {
                factors[m] = round_weights<Bits>(weights + m * kStripTokens, value_scales_ + b * kStripTokens,
                                                 weights_ + m * sizes_.weight_words);
                factors[m].scale *= lacking * share[m];
            }
            const auto use = [&](int m, int64_t d, vi sums) __attribute__((always_inline)) {
                if (m == 0) ahead_.fetch_some();
                float* target = rows_.out + (first + m) * rows_.ldv + b * block + d;
                const vf part = to_float(sums - kBias<Bits> * factors[m].sum) * factors[m].scale;
                store(target, load<vf>(target) + part);
            };
            multiply_quads<Bits, kSealedRows>(count, value_quads_ + b * block, sizes_.value_stride, kValueQuads, width,
                                              weights_, sizes_.weight_words, use);
        }
    }

    const Strips& strips_;
    const int head_;
    const float softcap_;
    const Gathered rows_;
    const CodedSizes sizes_;
    int32_t *key_quads_, *value_quads_, *queries_, *weights_;
    float *key_scales_, *key_zeros_, *value_scales_, *query_sums_, *scores_;
    Factor* query_factors_;
    const uint8_t* counts_ = nullptr;
    Ahead ahead_;
};

}  // namespace

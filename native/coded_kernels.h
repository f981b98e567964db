// Attention on strips of integer codes that lie token by token (codecs int8, bfp), one instruction set at a time.
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
        query_factors_ = reinterpret_cast<Factor*>(value_scales_ + sizes_.value_blocks * kStripTokens);
        scores_ = reinterpret_cast<float*>(query_factors_ + vectors * sizes_.key_blocks);
        load_queries(vectors);
    }

    // Rounds what stands in the rows of queries now.
    void load_queries(int64_t vectors) {
        with_bits(strips_.key.bits, [&](auto bits) {
            for (int64_t m = 0; m < vectors; ++m) load_query<bits>(m);
        });
    }

    // Lays out a strip; `next` is what will be read then, or null.
    void open(char* strip, char* next) {
        with_bits(strips_.key.bits, [&](auto bits) {
            key_quads<bits>(strips_.keys(strip, head_), strips_.key.code_bytes(rows_.Dk), key_quads_);
        });
        with_bits(strips_.value.bits, [&](auto bits) {
            value_quads<bits>(strips_.values(strip, head_), strips_.value.code_bytes(rows_.Dv), value_block(),
                              sizes_.value_stride, value_quads_);
        });
        widen_scales(strips_.key, strips_.key_scales(strip, head_), sizes_.key_blocks, key_scales_);
        widen_scales(strips_.value, strips_.value_scales(strip, head_), sizes_.value_blocks, value_scales_);
        counts_ = strips_.counts(strip, head_);
        next_ = next;
        begin_ahead(next == nullptr ? 4 : 0);
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
            if (any) attend_few(first, count, slots);
        }
    }

   private:
    void attend_few(int64_t first, int64_t count, const Slots* slots) {
        with_bits(strips_.key.bits, [&](auto bits) { score<bits>(first, count); });
        float share[kSealedRows];
        for (int64_t m = 0; m < count; ++m) {
            const StripSum sum = weigh_strip(scores_ + m * kStripTokens, slots[m].low, slots[m].high, softcap_, counts_);
            share[m] = merge_strip(rows_, first + m, sum);
        }
        with_bits(strips_.value.bits, [&](auto bits) { gather<bits>(first, count, share); });
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
            Factor factor = round_queries<Bits>(rows_.q + m * rows_.ldk + b * block, block, words);
            factor.scale *= unit(strips_.key);
            query_factors_[m * sizes_.key_blocks + b] = factor;
        }
    }

    // Some lines of the next strip, between the arithmetic: all at once would wait for each other.
    void prefetch_some() {
        if (ahead_ == nullptr) return;
        for (int i = 0; i < 8 && ahead_ < ahead_end_; ++i, ahead_ += 64) __builtin_prefetch(ahead_, 0, 2);
        if (ahead_ >= ahead_end_) begin_ahead(part_ + 1);
    }

    void begin_ahead(int part) {
        const Strips& s = strips_;
        const auto from = [&](char* data, int64_t bytes) { ahead_ = data, ahead_end_ = data + kStripTokens * bytes; };
        part_ = part;
        switch (part) {
            case 0: return from(s.keys(next_, head_), s.key.code_bytes(rows_.Dk));
            case 1: return from(s.key_scales(next_, head_), s.key.scale_bytes(rows_.Dk));
            case 2: return from(s.values(next_, head_), s.value.code_bytes(rows_.Dv));
            case 3: return from(s.value_scales(next_, head_), s.value.scale_bytes(rows_.Dv));
            default: ahead_ = nullptr;
        }
    }

    // scores = q . keys, one block of channels after the other.
    template <int Bits>
    void score(int64_t first, int64_t count) {
        score_block<Bits, false>(first, count, 0);
        for (int64_t b = 1; b < sizes_.key_blocks; ++b) score_block<Bits, true>(first, count, b);
    }

    template <int Bits, bool Add>
    void score_block(int64_t first, int64_t count, int64_t b) {
        const int64_t quads = (key_block() + 3) / 4;
        const int32_t* words = queries_ + first * sizes_.query_words + b * quads * kFactorWords<Bits>;
        const float* scales = key_scales_ + b * kStripTokens;
        const Factor* factors = query_factors_ + first * sizes_.key_blocks + b;
        const auto use = [&](int m, int64_t t, vi sums) __attribute__((always_inline)) {
            if (m == 0) prefetch_some();
            const Factor factor = factors[m * sizes_.key_blocks];
            const vf part = to_float(sums - kBias<Bits> * factor.sum) * (load<vf>(scales + t) * factor.scale);
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
    void gather(int64_t first, int64_t count, const float* share) {
        const int64_t block = value_block(), width = min((block + W - 1) / W * W, rows_.ldv);
        const float lacking = unit(strips_.value);
        for (int64_t b = 0; b < sizes_.value_blocks; ++b) {
            Factor factors[kSealedRows];
            for (int64_t m = 0; m < count; ++m) {
                factors[m] = round_weights<Bits>(scores_ + m * kStripTokens, value_scales_ + b * kStripTokens,
                                                 weights_ + m * sizes_.weight_words);
                factors[m].scale *= lacking * share[m];
            }
            const auto use = [&](int m, int64_t d, vi sums) __attribute__((always_inline)) {
                if (m == 0) prefetch_some();
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
    float *key_scales_, *value_scales_, *scores_;
    Factor* query_factors_;
    const uint8_t* counts_ = nullptr;
    char *next_ = nullptr, *ahead_ = nullptr, *ahead_end_ = nullptr;
    int part_ = 0;
};

}  // namespace

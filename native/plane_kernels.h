// Rows that read keys plane by plane (kernels/base.py: Progress), one instruction set at a time.
//
// The high plane alone says each code to within 16: 7.5 stands for the low half. Its products with queries, rounded to 8
// bits, are exact integers of 4-bit codes; what is 127.5 scales above a group's minimum is multiplied with the sum of the
// queries as they are, so only deviations from it see rounded queries. The low plane, read where a softmax is flat, adds
// its own deviations to the scores that are there.
#pragma once

#include "coded_kernels.h"
#include "layer_kernels.h"

namespace {

using elbowroom::AttendArgs;
using elbowroom::PlaneRow;

constexpr float kMiddle = 7.5f;  // of a half

// The query vectors of a head against one plane of one strip after the other.
class PlaneScores {
   public:
    // Scratch as `plane_floats` says.
    PlaneScores(const Strips& strips, int head, const float* q, int64_t ldq, int64_t vectors, float* scratch)
        : strips_(strips), head_(head), vectors_(vectors), sizes_(strips), block_(strips.key.block) {
        quads_ = reinterpret_cast<int32_t*>(scratch);
        words_ = quads_ + sizes_.key_quads;
        scales_ = reinterpret_cast<float*>(words_ + vectors * query_words());
        zeros_ = scales_ + sizes_.key_blocks * kStripTokens;
        factors_ = reinterpret_cast<Group*>(zeros_ + sizes_.key_blocks * kStripTokens);
        for (int64_t m = 0; m < vectors; ++m) {
            for (int64_t b = 0; b < sizes_.key_blocks; ++b) {
                const float* x = q + m * ldq + b * block_;
                const Factor factor = round_queries<4>(x, block_, words_ + m * query_words() + b * quads());
                const float middle = -kMiddle * factor.scale * float(factor.sum);
                factors_[m * sizes_.key_blocks + b] = {factor.scale, middle, sum_row(x, block_)};
            }
        }
    }

    // scores [vectors][64] by the high plane, or what the low one adds to them; `next`: the strip behind, or null.
    template <bool Low>
    void read(char* strip, char* next, float* scores) {
        const char* codes = strips_.keys(strip, head_) + (Low ? strips_.key.low_at(strips_.head_dim) : 0);
        key_quads<4>(codes, strips_.key.code_stride(strips_.head_dim), quads_);
        widen_planes(strips_.key, strips_.key_scales(strip, head_), sizes_.key_blocks, 17 * kMiddle, scales_, zeros_);
        for (int64_t i = 0; !Low && i < sizes_.key_blocks * kStripTokens; i += W) {
            store(scales_ + i, load<vf>(scales_ + i) * 16.0f);
        }
        ahead_.clear();
        if (next != nullptr) ahead_.add_keys(strips_, next, head_, Low);
        for (int64_t first = 0; first < vectors_; first += kSealedRows) {
            const int64_t count = min(kSealedRows, vectors_ - first);
            score_group<Low, false>(first, count, 0, scores + first * kStripTokens);
            for (int64_t b = 1; b < sizes_.key_blocks; ++b) {
                score_group<Low, true>(first, count, b, scores + first * kStripTokens);
            }
        }
    }

   private:
    // A group's queries: products with their integers times `scale` plus `middle` is what halves less their middle come
    // to; `sum`: of the queries as they are.
    struct Group {
        float scale, middle, sum;
    };

    int64_t quads() const { return block_ / 4; }
    int64_t query_words() const { return strips_.head_dim / 4; }

    template <bool Low, bool Add>
    void score_group(int64_t first, int64_t count, int64_t b, float* scores) {
        const float *scales = scales_ + b * kStripTokens, *zeros = zeros_ + b * kStripTokens;
        const Group* factors = factors_ + first * sizes_.key_blocks + b;
        const auto use = [&](int m, int64_t t, vi products) __attribute__((always_inline)) {
            if (m == 0) ahead_.fetch_some();
            const Group factor = factors[m * sizes_.key_blocks];
            const vf halves = to_float(products) * factor.scale + factor.middle;
            float* target = scores + m * kStripTokens + t;
            vf before{};
            if constexpr (Add) before = load<vf>(target);
            if constexpr (!Low) before += load<vf>(zeros + t) * factor.sum;
            store(target, halves * load<vf>(scales + t) + before);
        };
        multiply_quads<4, kSealedRows>(count, quads_ + b * quads() * kStripTokens, kStripTokens, quads(), kStripTokens,
                                       words_ + first * query_words() + b * quads(), query_words(), use);
    }

    const Strips& strips_;
    const int head_;
    const int64_t vectors_;
    const CodedSizes sizes_;
    const int64_t block_;
    int32_t *quads_, *words_;
    float *scales_, *zeros_;
    Group* factors_;
    Ahead ahead_;
};

inline char* strip_of(const AttendArgs& args, const PlaneRow& row, int64_t block) {
    return args.strips.strip(row.sequence, row.first_block + block);
}

inline Slots slots_of(const PlaneRow& row, int64_t block) {
    const int64_t start = (row.first_block + block) * kStripTokens;
    return {row.low - start, row.high - start};
}

// The query heads of a KV head in float32, scaled, zeros behind them.
inline void load_group(const AttendArgs& args, const PlaneRow& row, int head, float* q, int64_t ldq) {
    const int64_t width = args.strips.head_dim;
    for (int m = 0; m < args.group_size(); ++m, q += ldq) {
        widen_row(args.q.at(row.row, int64_t{head} * args.group_size() + m), args.q.dtype, q, width);
        for (int64_t d = 0; d < width; ++d) q[d] *= args.spec.scale;
        for (int64_t d = width; d < ldq; ++d) q[d] = 0;
    }
}

// Scores become weights; returns their sum and the score whose weight is 1. What is not a number shows in the sum.
inline elbowroom::BlockSum weigh_block(float* scores, Slots seen) {
    const auto hide = [&](float with) {
        for (int64_t i = 0; i < seen.low && i < kStripTokens; ++i) scores[i] = with;
        for (int64_t i = max(0, seen.high); i < kStripTokens; ++i) scores[i] = with;
    };
    hide(-__builtin_inff());
    vf tops = load<vf>(scores);
    for (int i = W; i < kStripTokens; i += W) tops = vmax(tops, load<vf>(scores + i));
    const float top = greatest_lane(tops);
    vf sums{};
    for (int i = 0; i < kStripTokens; i += W) {
        const vf x = vexp_coarse(load<vf>(scores + i) - top);
        sums += x;
        store(scores + i, x);
    }
    if (seen.low <= 0 && seen.high >= kStripTokens) return {top, sum_lanes(sums), 0};
    hide(0);  // the coarse exponential ends above 0
    sums = vf{};
    for (int i = 0; i < kStripTokens; i += W) sums += load<vf>(scores + i);
    return {top, sum_lanes(sums), 0};
}

// The same of scores before the softcap, which stay.
inline elbowroom::BlockSum weigh_capped(const float* scores, Slots seen, float softcap, float* weights) {
    __builtin_memcpy(weights, scores, kStripTokens * sizeof(float));
    const StripSum sum = weigh_strip(weights, seen.low, seen.high, softcap, nullptr);
    return {sum.top, sum.weights, 0};
}

// Weights by what the low plane adds to their scores, beside the same top.
inline void shift_weights(const float* added, float* weights, elbowroom::BlockSum& found) {
    vf sums{};
    for (int i = 0; i < kStripTokens; i += W) {
        const vf weight = load<vf>(weights + i);
        const vf shifted = weight == 0.0f ? vf{} : weight * vexp(load<vf>(added + i));  // 0: hidden, whatever is there
        sums += shifted;
        store(weights + i, shifted);
    }
    found.sum = sum_lanes(sums);
}

template <bool Low>
void score_strips(const AttendArgs& args, const PlaneRow& row, int head, int64_t first, int64_t end, float* scratch) {
    const int64_t group = args.group_size(), ldq = elbowroom::padded(args.strips.head_dim);
    load_group(args, row, head, scratch, ldq);
    float* added = scratch + group * ldq;
    PlaneScores plane(args.strips, head, scratch, ldq, group, added + group * kStripTokens);
    for (int64_t block = first; block < end; ++block) {
        float* scores = row.weights + row.index(head, block) * group * kStripTokens;
        elbowroom::BlockSum* sums = row.sums + row.index(head, block) * group;
        char* next = block + 1 < end ? strip_of(args, row, block + 1) : nullptr;
        plane.read<Low>(strip_of(args, row, block), next, Low ? added : scores);
        const Slots slots = slots_of(row, block);
        for (int64_t m = 0; m < group; ++m, scores += kStripTokens) {
            if (args.spec.softcap > 0) {
                for (int64_t i = 0; Low && i < kStripTokens; ++i) scores[i] += added[m * kStripTokens + i];
                float weights[kStripTokens];
                sums[m] = weigh_capped(scores, slots, args.spec.softcap, weights);
            } else if (Low) {
                shift_weights(added + m * kStripTokens, scores, sums[m]);
            } else {
                sums[m] = weigh_block(scores, slots);
            }
        }
    }
}

void score_plane(const AttendArgs& args, const PlaneRow& row, int head, int64_t first, int64_t end, bool low,
                 float* scratch) {
    low ? score_strips<true>(args, row, head, first, end, scratch)
        : score_strips<false>(args, row, head, first, end, scratch);
}

void gather_read(const AttendArgs& args, const PlaneRow& row, int head, int64_t first, int64_t end, float* out,
                 float* scratch) {
    const int64_t group = args.group_size(), Dv = args.strips.v_head_dim, ldv = elbowroom::padded(Dv);
    float *gathered = scratch, *capped = gathered + group * ldv;
    for (int64_t i = 0; i < group * ldv; ++i) gathered[i] = 0;
    const Gathered rows{args.strips.head_dim, Dv, 0, ldv, nullptr, gathered, nullptr, nullptr};
    CodedStrips strips(args.strips, head, args.spec.softcap, rows, group, capped + group * kStripTokens);
    const uint8_t* read = row.read + row.index(head, 0);
    const auto next_read = [&](int64_t block) {
        while (block < end && !read[block]) ++block;
        return block;
    };
    for (int64_t block = next_read(first); block < end;) {
        const int64_t next = next_read(block + 1);
        strips.open_values(strip_of(args, row, block), next < end ? strip_of(args, row, next) : nullptr);
        const float* weights = row.weights + row.index(head, block) * group * kStripTokens;
        for (int64_t m = 0; args.spec.softcap > 0 && m < group; ++m) {
            weigh_capped(weights + m * kStripTokens, slots_of(row, block), args.spec.softcap, capped + m * kStripTokens);
        }
        strips.gather_weights(group, args.spec.softcap > 0 ? capped : weights, row.sums + row.index(head, block) * group);
        block = next;
    }
    strips.finish(group);
    for (int64_t m = 0; m < group; ++m, out += Dv) __builtin_memcpy(out, gathered + m * ldv, Dv * sizeof(float));
}

}  // namespace

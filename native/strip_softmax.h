// The softmax over one strip and how it joins the others, for strips whose products are integers.
//
// A strip's weights are relative to its own greatest score, so that what rounding does to them does not depend on the
// strips before it.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using elbowroom::kStripTokens;

// Query vectors of an item and what they have gathered; rows of q and out are padded to whole vectors.
struct Gathered {
    int64_t Dk, Dv, ldk, ldv;
    float *q, *out, *max, *sum;
};

// The greatest score of a strip, and the sum of its weights.
struct StripSum {
    float top, weights;
};

// A slot of n tokens weighs what n equal ones would.
inline void add_counts(float* scores, const uint8_t* counts) {
    for (int64_t i = 0; i < kStripTokens; ++i) scores[i] += elbowroom::kLogs.of[counts[i]];
}

// Scores become exp(score - greatest), 0 where not seen: slots low .. high - 1 are. `counts`: tokens of slots, or null.
inline StripSum weigh_strip(float* scores, int64_t low, int64_t high, float softcap, const uint8_t* counts) {
    const auto hide = [&](float with) {
        for (int64_t i = 0; i < low && i < kStripTokens; ++i) scores[i] = with;
        for (int64_t i = high > 0 ? high : 0; i < kStripTokens; ++i) scores[i] = with;
    };
    hide(-__builtin_inff());
    if (counts != nullptr) {
        if (softcap > 0) {
            for (int i = 0; i < kStripTokens; i += W) {
                const vf x = load<vf>(scores + i);
                store(scores + i, x == -__builtin_inff() ? x : vtanh(x / softcap) * softcap);
            }
            softcap = 0;
        }
        add_counts(scores, counts);
    }
    vf tops = splat(-__builtin_inff());
    for (int i = 0; i < kStripTokens; i += W) {
        vf x = load<vf>(scores + i);
        if (softcap > 0) {
            x = x == -__builtin_inff() ? x : vtanh(x / softcap) * softcap;
            store(scores + i, x);
        }
        tops = (x <= tops) | (tops != tops) ? tops : x;  // NaN is the greatest: it must not be hidden
    }
    const float top = max_lane(tops);
    vf sums{};
    for (int i = 0; i < kStripTokens; i += W) {
        const vf x = top == -__builtin_inff() ? vf{} : vexp_coarse(load<vf>(scores + i) - top);
        sums += x;
        store(scores + i, x);
    }
    hide(0);  // the coarse exponential ends above 0
    return {top, sum_lanes(sums)};
}

// Joins a strip to what a query vector has gathered; returns what the strip's weights are worth then.
inline float merge_strip(const Gathered& rows, int64_t row, StripSum strip) {
    if (strip.top == -__builtin_inff()) return 0;
    if (!(strip.top <= rows.max[row])) {
        const float rescale = exp_one(rows.max[row] - strip.top);
        float* out = rows.out + row * rows.ldv;
        for (int64_t d = 0; d < rows.ldv; d += W) store(out + d, load<vf>(out + d) * rescale);
        rows.sum[row] *= rescale;
        rows.max[row] = strip.top;
        rows.sum[row] += strip.weights;
        return strip.top - strip.top == 0 ? 1.0f : strip.top - strip.top;  // NaN stays
    }
    const float share = exp_one(strip.top - rows.max[row]);
    rows.sum[row] += share * strip.weights;
    return share;
}

}  // namespace

// What each instruction set provides: the inner loops over one work item, chosen at run time by isa.cpp.
#pragma once

#include "types.h"

namespace elbowroom {

// One query head group of a few rows against consecutive strips of its sequence.
struct Item {
    int32_t sequence, head;  // head: KV head
    int32_t first_row, num_rows;
    int64_t first_block, end_block;
    int64_t partial;  // index of the item's first query vector in `partials`; -1: the item is alone, write `out`
    int32_t group;    // pieces that are merged together; -1: alone
};

struct AttendArgs {
    Step step;
    Strips strips;
    Spec spec;
    Rows q, out;
    float* lse;       // [N, Hq]
    float* partials;  // [vectors, Dv + 2]: unnormalised output, maximum, denominator

    int group_size() const { return spec.num_q_heads / strips.num_kv_heads; }
};

inline constexpr int64_t kBlock = 64;  // logits that sampling looks at together

struct SamplingTable {
    // The greatest of each kBlock values; NaN where one is NaN.
    void (*block_maxima)(const float* x, int64_t count, float* maxima);
    // exponents[i] = (x[i] - top) / temperature and weights[i] = exp(exponents[i]) of at most kBlock values; returns the
    // sum of the weights. Both arrays have room for kBlock.
    float (*weigh_block)(const float* x, int64_t count, float top, float temperature, float* exponents, float* weights);
};

struct KernelTable {
    const char* name;
    const SamplingTable& sampling;
    void (*attend)(const AttendArgs& args, const Item& item, float* scratch);
    void (*convert)(const char* source, DType from, char* target, DType to, int64_t count);
};

inline constexpr int64_t padded(int64_t width) { return (width + 31) / 32 * 32; }

// Floats of scratch that an item of `vectors` query vectors needs: q, out, scores, statistics, one strip of K and V.
inline constexpr int64_t scratch_floats(int64_t vectors, int64_t head_dim, int64_t v_head_dim) {
    const int64_t widths = padded(head_dim) + padded(v_head_dim);
    return vectors * (widths + kStripTokens) + padded(2 * vectors) + kStripTokens * widths;
}

extern const KernelTable kernels_baseline;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;

}  // namespace elbowroom

// What each instruction set provides: the inner loops over one work item, chosen at run time by isa.cpp.
#pragma once

#include <algorithm>

#include "types.h"

namespace elbowroom {

// A row of the step, and whose it is.
struct Member {
    int32_t row, sequence;
};

// One query head group of a few rows against consecutive strips of their sequence, or of several that share the strips.
struct Item {
    int32_t sequence, head;  // head: KV head; the strips are those in the table of `sequence`
    int32_t first_row, num_rows;
    int64_t first_block, end_block;
    int64_t partial;  // index of the item's first query vector in `partials`; -1: the item is alone, write `out`
    int32_t first_group, num_groups;  // places in `Plan::groups_of` of what its pieces are merged into; 0: it is alone
    const uint32_t* selected;  // places of the blocks that the item reads in `strips`, counted from 0; null: all
    int64_t num_hidden;        // blocks before the row's own one that are not counted then
    int32_t place;             // of the head in sealed strips
    int32_t first_member;      // its rows in `members`; -1: rows first_row .. first_row + num_rows - 1 of `sequence`
};

struct AttendArgs {
    Step step;
    Strips strips;
    const Strips* tail;        // null, or: a row reads its own block here, and only those before it in `strips`
    const int64_t* open_from;  // [R]: blocks from here on are read in the tail as well; null: only the own one
    const int8_t* places;      // [R, Hkv]: see LayerStrips
    Spec spec;
    Rows q, out;
    float* lse;       // [N, Hq], or null: nobody asks
    float* partials;  // [vectors, Dv + 2]: unnormalised output, maximum, denominator
    const Member* members;  // rows of items that several sequences share

    int num_kv_heads() const { return open_strips().num_kv_heads; }
    int group_size() const { return spec.num_q_heads / num_kv_heads(); }
    const Strips& open_strips() const { return tail == nullptr ? strips : *tail; }
    // With a tail: the block from which on a row at `position` reads there.
    int64_t first_open(int64_t sequence, int64_t position) const {
        const int64_t own = position / kStripTokens;
        return open_from == nullptr ? own : std::min(own, open_from[sequence]);
    }
};

// Weights of a block are exp(score - top); `sum` is theirs, and exp(top - greatest top of the row) their share.
struct BlockSum {
    float top, sum, share;
};

// A row that reads keys plane by plane: what it has found of the blocks that it may read, and which values it wants.
struct PlaneRow {
    int64_t sequence, row;
    int64_t low, high;                 // slots low .. high - 1
    int64_t first_block, num_blocks;
    float* weights;                    // [Hkv, num_blocks, group, 64]: see BlockSum; with a softcap, scores before it
    BlockSum* sums;                    // [Hkv, num_blocks, group]
    uint8_t* read;                     // [Hkv, num_blocks]: 1 where values are read

    int64_t index(int head, int64_t block) const { return head * num_blocks + block; }
};

// Activations of many tokens lie in panels: [width][16], the 16 values of a token's column side by side.
inline constexpr int64_t kPanelTokens = 16;
inline constexpr int64_t kMultiplyDepth = 256;  // columns of weights that `multiply` widens at a time

// Whole vectors of every instruction set.
inline constexpr int64_t padded(int64_t width) { return (width + 31) / 32 * 32; }

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
    // Weights and sums of blocks first .. end - 1 (counted from the row's first) by the high plane of their keys, or with
    // what the low one adds to them.
    void (*score_plane)(const AttendArgs& args, const PlaneRow& row, int head, int64_t first, int64_t end, bool low,
                        float* scratch);
    // What the values read of those blocks come to for each query head, [group][Dv], by their weights and shares.
    void (*gather_read)(const AttendArgs& args, const PlaneRow& row, int head, int64_t first, int64_t end, float* out,
                        float* scratch);
    // Keys [64][head_dim] and values [64][v_head_dim] -> a head of a sealed strip; scratch as `seal_floats` says.
    void (*seal)(const SealedHead& head, const char* keys, const char* values, DType dtype, char* target, float* scratch);
    // Brings a head's digest up to date behind writing slots first .. stop - 1; `held` slots hold tokens. Scratch: 4 padded
    // rows.
    void (*digest)(const Strips& strips, char* strip, int head, int64_t first, int64_t stop, int64_t held, float* scratch);
    // The greatest score that a key of each of the strips at `entries` can have with one of `group` queries, unscaled; of
    // a query what is positive and what is negative, padded each: q [group][2][padded(Dk)].
    void (*bound)(const Strips& strips, const uint32_t* entries, int64_t count, int head, const float* q, int64_t group,
                  float* scores);
    // One vector x [width] -> its codes and scales.
    void (*encode)(const RowFormat& format, const float* x, int64_t width, char* codes, char* scales);
    void (*convert)(const char* source, DType from, char* target, DType to, int64_t count);
    void (*widen)(const char* source, DType from, float* target, int64_t count);
    // Tokens x [num_tokens, cols] in the order in which `dot` reads them: num_tokens * padded(cols) floats.
    void (*arrange)(const Matrix& matrix, const float* x, int64_t num_tokens, float* out);
    // y[m * ldy + n - first] = W[n] . x[m] + bias[n] for rows first <= n < end and few arranged tokens; with `add`, on
    // top of what is there.
    void (*dot)(const Matrix& matrix, int64_t first, int64_t end, const float* x, int64_t num_tokens, float* y,
                int64_t ldy, bool add);
    // The same for panels: x [num_panels][cols][16]; y + p * y_stride is [end - first][16].
    // Needs (end - first) * kMultiplyDepth floats of scratch.
    void (*multiply)(const Matrix& matrix, int64_t first, int64_t end, const float* x, int64_t num_panels, float* y,
                     int64_t y_stride, bool add, float* scratch);
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t width, float* out);
    void (*rms_norm_panel)(const float* x, const float* weight, float eps, int64_t width, float* out);
    void (*gate)(float* values, const float* up, int64_t count, Activation activation);
    void (*rotate)(float* head, const float* cos, const float* sin, int64_t width);
    void (*softcap)(float* x, int64_t count, float cap);
    void (*to_panel)(const float* rows, int64_t stride, int64_t num_tokens, int64_t count, float* panel);
    void (*to_rows)(const float* panel, int64_t count, int64_t num_tokens, float* rows, int64_t stride);
    int64_t (*multiply_add)(int64_t rounds, float* sink);
};

inline constexpr int kSealedRows = 4;  // query vectors that pass over a sealed strip together

// Floats of scratch that those need: scales, minima and folded factors, scores, products and their factors in bytes.
inline int64_t sealed_width(const Strips& strips) {
    return std::max(int64_t{kStripTokens}, padded(std::max(strips.head_dim, strips.v_head_dim)));
}
inline int64_t sealed_floats(const Strips& strips) {
    const int64_t width = sealed_width(strips);
    return strips.sealed() ? 3 * width + kSealedRows * (kStripTokens + width + width / 4) : 0;
}
inline int64_t seal_floats(const Strips& strips) { return (kStripTokens + 4) * sealed_width(strips); }

// 32-bit words of scratch for strips of codes that lie token by token: see coded_kernels.h.
struct CodedSizes {
    int64_t key_blocks, value_blocks;  // that share a scale
    int64_t key_quads, value_quads, value_stride;
    int64_t query_words, weight_words;  // of a query vector

    explicit CodedSizes(const Strips& strips)
        : key_blocks(strips.key.block > 0 ? strips.head_dim / strips.key.block : 1),
          value_blocks(strips.value.block > 0 ? strips.v_head_dim / strips.value.block : 1),
          key_quads((strips.head_dim + 127) / 128 * 32 * kStripTokens),
          value_quads(kStripTokens / 4 * padded(strips.v_head_dim)),
          value_stride(padded(strips.v_head_dim)),
          query_words(padded(strips.head_dim) / 2),
          weight_words(kStripTokens / 2) {}

    int64_t floats(int64_t vectors) const {
        const int64_t scales = (2 * key_blocks + value_blocks) * kStripTokens;
        return key_quads + value_quads + scales + vectors * (query_words + 3 * key_blocks) +
               kSealedRows * (weight_words + kStripTokens);
    }
};

// Floats of scratch that a row's group of query vectors needs when it reads plane by plane: queries, sums, scores, and the rest.
inline int64_t plane_floats(int64_t vectors, const Strips& strips) {
    const int64_t widths = padded(strips.head_dim) + padded(strips.v_head_dim);
    return vectors * (widths + kStripTokens) + CodedSizes(strips).floats(vectors);
}

inline int64_t coded_floats(int64_t vectors, const Strips& strips) {
    return strips.coded() ? CodedSizes(strips).floats(vectors) : 0;
}

// What products of integers take in an item: those of the open strips, or those of sealed ones.
inline int64_t integer_floats(int64_t vectors, const AttendArgs& args) {
    return coded_floats(vectors, args.strips) + sealed_floats(args.strips);
}

// Queries as they are, and their channels that a strip's keys have.
inline int64_t reduced_floats(int64_t vectors, const AttendArgs& args) {
    return args.strips.channels_at == 0 ? 0 : 2 * vectors * padded(args.open_strips().head_dim);
}

// Floats of scratch that an item of `vectors` query vectors needs: q, out, scores, statistics, one strip of K and V, that
// strip once more where it must be decoded, and what sealed strips take.
inline int64_t scratch_floats(int64_t vectors, const AttendArgs& args) {
    const Strips& strips = args.open_strips();
    const int64_t widths = padded(strips.head_dim) + padded(strips.v_head_dim);
    const int64_t decoded = strips.decoded() ? kStripTokens * widths : 0;
    const int64_t open = vectors * (widths + kStripTokens) + padded(2 * vectors) + kStripTokens * widths + decoded;
    return open + integer_floats(vectors, args) + reduced_floats(vectors, args);
}

// log n for n tokens of a slot. Made where no instruction set is asked for: it is made before one is chosen.
struct LogTable {
    float of[256];
    LogTable();
};
extern const LogTable kLogs;

extern const KernelTable kernels_baseline;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_emulated512;

}  // namespace elbowroom

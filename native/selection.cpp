#include "selection.h"

#include <algorithm>
#include <numeric>

#include "isa.h"
#include "parallel.h"

namespace elbowroom {
namespace {

// First block that a sequence's row may read, and the newest.
struct Reach {
    int64_t first, own;
};

Reach reach(const Step& step, int64_t sequence) {
    const int64_t last = std::min(step.positions[step.row_starts[sequence]], step.lengths[sequence] - 1);
    return {step.first_slots[sequence] / kStripTokens, last / kStripTokens};
}

}  // namespace

void Selected::build(const AttendArgs& args, const Selection& selection) {
    rows_.clear(), sequences_.clear();
    num_blocks_ = selection.num_blocks;
    if (num_blocks_ == 0) return;
    heads_ = args.strips.num_kv_heads;
    rows_.assign(size_t(args.step.num_sequences), -1);
    int64_t most = 0;
    for (int64_t s = 0; s < args.step.num_sequences; ++s) {
        if (!selection.rows[s]) continue;
        const auto [first, own] = reach(args.step, s);
        if (own - first < num_blocks_) continue;
        if (args.tail != nullptr && args.first_open(s, own * kStripTokens) < own) continue;  // unsealed: no bounds
        for (int64_t block = first; block < own + (args.tail == nullptr); ++block) check_strip(args.strips, s, block);
        rows_[size_t(s)] = int32_t(sequences_.size());
        sequences_.push_back(s);
        most = std::max(most, own - first + 1);
    }
    entries_.resize(sequences_.size() * size_t(heads_ * num_blocks_));
    const int64_t query_floats = 2 * args.group_size() * padded(args.strips.head_dim);
    parallel(int64_t(sequences_.size()) * heads_, 2 * padded(most) + query_floats, [&](int64_t item, float* scratch) {
        choose(args, sequences_[size_t(item / heads_)], int(item % heads_), scratch);
    });
}

// Scratch: scores and numbers of blocks, then the queries.
void Selected::choose(const AttendArgs& args, int64_t sequence, int head, float* scratch) {
    const auto [first, own] = reach(args.step, sequence);
    const int64_t count = own - first - 1, width = args.strips.head_dim, stride = padded(width);
    const int group = args.group_size();
    float *scores = scratch, *q = scratch + 2 * padded(count);
    for (int g = 0; g < group; ++g) {
        float *positive = q + 2 * g * stride, *negative = positive + stride;
        std::fill(positive, negative + stride, 0.0f);
        const char* row = args.q.at(args.step.row_starts[sequence], int64_t{head} * group + g);
        kernels().widen(row, args.q.dtype, positive, width);
        for (int64_t d = 0; d < width; ++d) {
            negative[d] = std::min(positive[d], 0.0f);
            positive[d] = std::max(positive[d], 0.0f);
        }
    }
    const uint32_t* table = args.strips.table + sequence * args.strips.num_blocks + first;
    kernels().bound(args.strips, table + 1, count, head, q, group, scores);
    int32_t* blocks = reinterpret_cast<int32_t*>(scores + padded(count));
    std::iota(blocks, blocks + count, 0);
    const auto better = [&](int32_t a, int32_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); };
    const int64_t chosen = num_blocks_ - 2;
    std::nth_element(blocks, blocks + chosen, blocks + count, better);
    std::sort(blocks, blocks + chosen);
    uint32_t* out = entries_.data() + (rows_[size_t(sequence)] * heads_ + head) * num_blocks_;
    out[0] = table[0];
    for (int64_t i = 0; i < chosen; ++i) out[i + 1] = table[blocks[i] + 1];
    if (args.tail == nullptr) out[num_blocks_ - 1] = table[own - first];
}

}  // namespace elbowroom

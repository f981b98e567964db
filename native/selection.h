// Which blocks the rows read that read a part of their sequence (kernels/base.py: Selection).
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace elbowroom {

// The choices of one call; buffers live as long as the calling thread, so a steady state allocates nothing.
class Selected {
   public:
    // Throws std::invalid_argument when a strip lies outside its range.
    void build(const AttendArgs& args, const Selection& selection);

    // Whether a sequence reads a part of its blocks only.
    bool has(int64_t sequence) const { return !rows_.empty() && rows_[size_t(sequence)] >= 0; }
    // Places of the blocks that a KV head of such a sequence reads, the newest last unless it lies in a tail.
    const uint32_t* entries(int64_t sequence, int head) const {
        return entries_.data() + (rows_[size_t(sequence)] * heads_ + head) * num_blocks_;
    }
    int64_t num_blocks() const { return num_blocks_; }

   private:
    void choose(const AttendArgs& args, int64_t sequence, int head, float* scratch);

    int64_t num_blocks_ = 0, heads_ = 0;
    std::vector<int32_t> rows_;       // [R]: which row of entries_ is a sequence's; -1: none
    std::vector<int64_t> sequences_;  // those that have one
    std::vector<uint32_t> entries_;   // [rows, Hkv, num_blocks]
};

}  // namespace elbowroom

// The work items of a call of attention: which query vectors meet which strips, and where their pieces come together.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "selection.h"
#include "sharing.h"

namespace elbowroom {

inline constexpr int kItemVectors = 64;  // query vectors of an item: packing a strip pays from some dozens on

// A few rows and a KV head, whose pieces are merged by whoever finishes the last of them.
struct Group {
    int32_t head, first_row, num_rows;
    int32_t first_part, num_parts;  // places in `parts`
};

// Buffers live as long as the calling thread, so a steady state allocates nothing.
class Plan {
   public:
    // Throws std::invalid_argument when a strip lies outside its range.
    void build(const AttendArgs& args, const LayerStrips& layer, int num_threads);

    const std::vector<Item>& items() const { return items_; }
    const Group& group(int32_t index) const { return groups_[size_t(index)]; }
    // Groups of the rows of an item, one behind the other.
    const int32_t* groups_of(const Item& item) const { return groups_of_.data() + item.first_group; }
    // Says that a piece of a group is done; returns whether it was the last.
    bool finish_part(int32_t group) { return unfinished_[size_t(group)].fetch_sub(1, std::memory_order_acq_rel) == 1; }
    // First query vectors of the pieces of a group, in the order of their strips.
    const int64_t* parts(const Group& group) const { return parts_.data() + group.first_part; }
    float* partials() { return partials_.data(); }
    const Member* members() const { return members_.data(); }

   private:
    void add_reader(const AttendArgs& args, int32_t sequence, int32_t row, int32_t num_rows);
    void add_selected(const AttendArgs& args, int32_t sequence, int32_t row);
    void add_run(const AttendArgs& args, const SharedRun& run);
    void add_together(const AttendArgs& args, const SharedRun& run, int64_t first, int64_t end, int64_t vectors);
    void add_own(const AttendArgs& args, int64_t reader);
    int32_t add_group(int32_t head, int32_t row, int32_t num_rows);
    void add_item(const AttendArgs& args, const Item& item, int32_t group, bool has_more);
    void add_pieces(Item item, const int32_t* groups, int32_t num_groups, int64_t vectors);
    void link(int64_t group_size);

    bool may_cut_ = false;
    int64_t partial_vectors_ = 0;
    std::vector<Item> items_;
    std::vector<Reader> readers_;
    std::vector<int32_t> first_groups_;  // of each reader, for its first KV head
    std::vector<Group> groups_;
    std::vector<int32_t> groups_of_;
    std::vector<int64_t> parts_;
    std::vector<Member> members_;
    std::vector<int32_t> together_;
    size_t num_unfinished_ = 0;
    std::unique_ptr<std::atomic<int32_t>[]> unfinished_;
    std::vector<float> partials_;
    Selected selected_;
    Sharing sharing_;
};

}  // namespace elbowroom

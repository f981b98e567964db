#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace elbowroom {
namespace {

constexpr int64_t kPieceStrips = 16;  // strips of a piece of a long sequence; fixed, so results do not depend on threads
constexpr int kFewRows = 8;           // query vectors up to which a sequence is always cut into pieces

int32_t place_of(const AttendArgs& args, int32_t sequence, int32_t head) {
    return args.places == nullptr ? head : args.places[sequence * args.num_kv_heads() + head];
}

}  // namespace

void Plan::build(const AttendArgs& args, const LayerStrips& layer, int num_threads) {
    items_.clear(), readers_.clear(), first_groups_.clear(), groups_.clear(), groups_of_.clear(), members_.clear();
    selected_.build(args, layer.selection);
    partial_vectors_ = 0;
    const int rows_per_item = std::max(1, kItemVectors / args.group_size());
    const int64_t heads = args.num_kv_heads(), rows = args.step.row_starts[args.step.num_sequences];
    // Large items are cut only when there are too few for the threads: their partial results are large as well.
    may_cut_ = heads * ((rows + rows_per_item - 1) / rows_per_item) < 2 * num_threads;
    for (int64_t s = 0; s < args.step.num_sequences; ++s) {
        const int32_t start = args.step.row_starts[s], end = args.step.row_starts[s + 1];
        for (int32_t row = start; row < end; row += rows_per_item) {
            if (layer.selection.by_planes(s)) continue;
            if (selected_.has(s)) {
                add_selected(args, int32_t(s), row);
            } else {
                add_reader(args, int32_t(s), row, std::min(rows_per_item, end - row));
            }
        }
    }
    // KV heads of which some are gone are gone from each sequence by itself.
    if (layer.shares && readers_.size() > 1 && args.places == nullptr) {
        sharing_.build(args.strips, readers_);
        for (const SharedRun& run : sharing_.runs()) add_run(args, run);
    }
    for (size_t i = 0; i < readers_.size(); ++i) add_own(args, int64_t(i));
    link(args.group_size());
    partials_.resize(size_t(partial_vectors_ * (args.strips.v_head_dim + 2)));
}

void Plan::add_reader(const AttendArgs& args, int32_t sequence, int32_t row, int32_t num_rows) {
    const int64_t* positions = args.step.positions + row;
    const auto [least, most] = std::minmax_element(positions, positions + num_rows);
    int64_t low = args.step.first_slots[sequence];
    if (args.spec.window > 0) low = std::max(low, *least - args.spec.window + 1);
    const int64_t high = std::min(*most, args.step.lengths[sequence] - 1);
    const int64_t first = low / kStripTokens, end = high / kStripTokens + 1;
    const int64_t sealed_end = args.tail == nullptr ? end : args.first_open(sequence, high);
    const int64_t open = args.tail == nullptr ? end : std::max(first, args.first_open(sequence, *least));
    for (int64_t block = first; block < sealed_end; ++block) check_strip(args.strips, sequence, block);
    for (int64_t block = open; block < end; ++block) check_strip(*args.tail, sequence, block);
    first_groups_.push_back(int32_t(groups_.size()));
    for (int32_t head = 0; head < args.num_kv_heads(); ++head) {
        const int32_t place = place_of(args, sequence, head);
        if (first < sealed_end && place >= args.strips.num_kv_heads) {
            throw std::invalid_argument("strips of " + std::to_string(args.strips.num_kv_heads) +
                                        " KV heads are read at place " + std::to_string(place));
        }
        add_group(head, row, num_rows);
    }
    // An item that is full gains nothing from more rows, and those of a chunk stay as they are.
    const bool may_share = num_rows < std::max(1, kItemVectors / args.group_size());
    readers_.push_back({sequence, row, num_rows, first, end, may_share ? std::min(open, end) : first, first});
}

// A row that reads some blocks sees them as if there were no others.
void Plan::add_selected(const AttendArgs& args, int32_t sequence, int32_t row) {
    const int64_t own = args.step.positions[row] / kStripTokens, count = selected_.num_blocks();
    if (args.tail != nullptr) check_strip(*args.tail, sequence, own);
    for (int32_t head = 0; head < args.num_kv_heads(); ++head) {
        const uint32_t* entries = selected_.entries(sequence, head);
        const Item item{sequence, head, row, 1, 0, count, -1, 0, 0, entries, own + 1 - count, head, -1};
        add_item(args, item, add_group(head, row, 1), false);
    }
}

// Blocks that several readers share: items of as many of their query vectors as fit, all of about the same size.
void Plan::add_run(const AttendArgs& args, const SharedRun& run) {
    const auto vectors_of = [&](int64_t place) {
        return readers_[size_t(sharing_.order()[size_t(place)])].num_rows * int64_t{args.group_size()};
    };
    int64_t vectors = 0;
    for (int64_t i = run.first; i < run.first + run.count; ++i) vectors += vectors_of(i);
    const int64_t items = (vectors + kItemVectors - 1) / kItemVectors, most = (vectors + items - 1) / items;
    for (int64_t first = run.first, end = first; first < run.first + run.count; first = end) {
        int64_t taken = vectors_of(end++);
        while (end < run.first + run.count && taken < most && taken + vectors_of(end) <= kItemVectors) {
            taken += vectors_of(end++);
        }
        add_together(args, run, first, end, taken);
    }
}

// An item of the readers at places first .. end - 1 of the order, for each KV head.
void Plan::add_together(const AttendArgs& args, const SharedRun& run, int64_t first, int64_t end, int64_t vectors) {
    const int32_t first_member = int32_t(members_.size());
    for (int64_t i = first; i < end; ++i) {
        const Reader& reader = readers_[size_t(sharing_.order()[size_t(i)])];
        for (int32_t r = 0; r < reader.num_rows; ++r) members_.push_back({reader.first_row + r, reader.sequence});
    }
    const Member leader = members_[size_t(first_member)];
    const int32_t num_rows = int32_t(members_.size()) - first_member;
    for (int32_t head = 0; head < args.num_kv_heads(); ++head) {
        together_.clear();
        for (int64_t i = first; i < end; ++i) together_.push_back(first_groups_[size_t(sharing_.order()[size_t(i)])] + head);
        const Item item{leader.sequence, head, leader.row, num_rows, run.first_block, run.end_block, -1, 0, 0, nullptr, 0,
                        head, first_member};
        add_pieces(item, together_.data(), int32_t(together_.size()), vectors);
    }
}

// Blocks that a reader reads alone.
void Plan::add_own(const AttendArgs& args, int64_t index) {
    const Reader& reader = readers_[size_t(index)];
    const bool has_more = reader.own_block > reader.first_block;
    if (has_more && reader.own_block == reader.end_block) return;
    for (int32_t head = 0; head < args.num_kv_heads(); ++head) {
        const int32_t place = place_of(args, reader.sequence, head);
        const int64_t end = place < 0 ? reader.first_block : reader.end_block;
        const Item item{reader.sequence, head, reader.first_row, reader.num_rows, reader.own_block, end, -1, 0, 0,
                        nullptr, 0, place, -1};
        add_item(args, item, first_groups_[size_t(index)] + head, has_more);
    }
}

int32_t Plan::add_group(int32_t head, int32_t row, int32_t num_rows) {
    groups_.push_back({head, row, num_rows, 0, 0});
    return int32_t(groups_.size()) - 1;
}

// With `has_more`, other items hold pieces of the same rows.
void Plan::add_item(const AttendArgs& args, const Item& item, int32_t group, bool has_more) {
    const int64_t vectors = int64_t{item.num_rows} * args.group_size();
    const bool long_enough = (item.end_block - 1) / kPieceStrips > item.first_block / kPieceStrips;
    if (has_more || ((vectors <= kFewRows || may_cut_) && long_enough)) {
        add_pieces(item, &group, 1, vectors);
    } else {
        items_.push_back(item);
    }
}

// Cuts at multiples of kPieceStrips: where a sum is cut depends on positions only.
void Plan::add_pieces(Item item, const int32_t* groups, int32_t num_groups, int64_t vectors) {
    const int64_t end = item.end_block;
    item.num_groups = num_groups;
    item.first_group = int32_t(groups_of_.size());
    groups_of_.insert(groups_of_.end(), groups, groups + num_groups);
    for (int64_t block = item.first_block; block < end; block = item.end_block) {
        item.first_block = block;
        item.end_block = std::min(end, (block / kPieceStrips + 1) * kPieceStrips);
        item.partial = partial_vectors_;
        partial_vectors_ += vectors;
        items_.push_back(item);
        for (int32_t i = 0; i < num_groups; ++i) ++groups_[size_t(groups[i])].num_parts;
    }
}

// Tells groups which pieces are theirs. Items were made in the order of strips: what is shared first.
void Plan::link(int64_t group_size) {
    if (groups_.size() > num_unfinished_) {
        num_unfinished_ = groups_.size();
        unfinished_ = std::make_unique<std::atomic<int32_t>[]>(num_unfinished_);
    }
    int32_t first = 0;
    for (size_t i = 0; i < groups_.size(); ++i) {
        unfinished_[i].store(groups_[i].num_parts, std::memory_order_relaxed);
        groups_[i].first_part = first;
        first += groups_[i].num_parts;
        groups_[i].num_parts = 0;
    }
    parts_.resize(size_t(first));
    for (const Item& item : items_) {
        int64_t vector = item.partial;
        for (int32_t i = 0; i < item.num_groups; ++i) {
            Group& group = groups_[size_t(groups_of(item)[i])];
            parts_[size_t(group.first_part + group.num_parts++)] = vector;
            vector += group.num_rows * group_size;
        }
    }
}

}  // namespace elbowroom

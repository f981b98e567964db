#include "sharing.h"

#include <algorithm>

namespace elbowroom {
namespace {

const uint32_t* entries(const Strips& strips, const Reader& reader) {
    return strips.table + reader.sequence * strips.num_blocks;
}

}  // namespace

// Sorts places first .. first + count - 1 of the order, so that readers of equal keys lie side by side.
template <class Key>
void Sharing::split(int64_t first, int64_t count, Key key) {
    keyed_.clear();
    for (int64_t i = first; i < first + count; ++i) keyed_.push_back({key(order_[size_t(i)]), order_[size_t(i)]});
    std::sort(keyed_.begin(), keyed_.end(), [](const Keyed& a, const Keyed& b) {
        return a.key < b.key || (a.key == b.key && a.reader < b.reader);
    });
    for (int64_t i = 0; i < count; ++i) order_[size_t(first + i)] = keyed_[size_t(i)].reader;
}

void Sharing::build(const Strips& strips, std::vector<Reader>& readers) {
    runs_.clear(), order_.clear();
    for (size_t i = 0; i < readers.size(); ++i) {
        readers[i].own_block = readers[i].first_block;
        if (readers[i].shared_end - readers[i].first_block >= kLeastStrips) order_.push_back(int32_t(i));
    }
    // Readers begin together: at the same block, with the same strip.
    const auto start = [&](int32_t i) {
        const Reader& reader = readers[size_t(i)];
        return uint64_t(reader.first_block) << 32 | entries(strips, reader)[reader.first_block];
    };
    const int64_t count = int64_t(order_.size());
    if (count > 1) split(0, count, start);
    for (int64_t first = 0, end = 0; first < count; first = end) {
        const uint64_t key = start(order_[size_t(first)]);
        for (end = first + 1; end < count && start(order_[size_t(end)]) == key; ++end) {}
        if (end - first > 1) descend(strips, readers, first, end - first, readers[size_t(order_[size_t(first)])].first_block);
    }
}

// Some readers have the strip of `block` in common, and all before it.
void Sharing::descend(const Strips& strips, std::vector<Reader>& readers, int64_t first, int64_t count, int64_t block) {
    const auto reader = [&](int64_t place) -> Reader& { return readers[size_t(order_[size_t(place)])]; };
    const uint32_t* leader = entries(strips, reader(first));
    int64_t end = reader(first).shared_end;
    for (int64_t i = first + 1; i < first + count; ++i) {
        end = std::min(end, reader(i).shared_end);
        end = std::mismatch(leader + block, leader + end, entries(strips, reader(i)) + block).first - leader;
    }
    if (end - block >= kLeastStrips) {
        runs_.push_back({block, end, first, count});
        for (int64_t i = first; i < first + count; ++i) reader(i).own_block = end;
        block = end;
    }
    // Not all go on together. Sorting them leaves the run what it is: it says which places, not in which order.
    constexpr uint64_t kStops = ~uint64_t{0};
    const auto next = [&](int32_t i) {
        const Reader& each = readers[size_t(i)];
        return end < each.shared_end ? uint64_t{entries(strips, each)[end]} : kStops;
    };
    split(first, count, next);
    for (int64_t i = first, stop = i; i < first + count; i = stop) {
        const uint64_t key = next(order_[size_t(i)]);
        for (stop = i + 1; stop < first + count && next(order_[size_t(stop)]) == key; ++stop) {}
        if (stop - i > 1 && key != kStops) descend(strips, readers, i, stop - i, block);
    }
}

}  // namespace elbowroom

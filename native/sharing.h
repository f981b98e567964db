// Which rows of a step read the same strips: sequences that were forked, or that continue one cached prefix.
//
// Found in the table of a layer, so whoever shares strips profits, at whatever level: a system prompt that all share,
// under it documents that some share.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace elbowroom {

// A few rows of a sequence that are worked on together, and the blocks that any of them reads.
struct Reader {
    int32_t sequence, first_row, num_rows;
    int64_t first_block, end_block;
    int64_t shared_end;  // blocks before it may be read together with other readers
    int64_t own_block;   // what `build` finds: the reader reads blocks from here on alone
};

// Readers that read the same strips, at places first .. first + count - 1 of `Sharing::order`.
struct SharedRun {
    int64_t first_block, end_block;
    int64_t first, count;
};

// What is shared in one call; buffers live as long as the calling thread, so a steady state allocates nothing.
class Sharing {
   public:
    // Finds runs of at least kLeastStrips strips that two readers or more have in common, and sets `own_block` of all
    // readers. Runs of a reader come in the order of its blocks.
    void build(const Strips& strips, std::vector<Reader>& readers);

    const std::vector<SharedRun>& runs() const { return runs_; }
    const std::vector<int32_t>& order() const { return order_; }  // readers by number

   private:
    static constexpr int64_t kLeastStrips = 2;

    template <class Key>
    void split(int64_t first, int64_t count, Key key);
    void descend(const Strips& strips, std::vector<Reader>& readers, int64_t first, int64_t count, int64_t block);

    struct Keyed {
        uint64_t key;
        int32_t reader;
    };

    std::vector<SharedRun> runs_;
    std::vector<int32_t> order_;
    std::vector<Keyed> keyed_;
};

}  // namespace elbowroom

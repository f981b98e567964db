// Append and attend over strips: checks strips, cuts the step into work items and gives them to the pool.
#pragma once

#include <optional>

#include "types.h"

namespace elbowroom {

// Full strips [count] at base + 64 * from of open strips, to be encoded to base + 64 * to of sealed ones.
struct Seals {
    int64_t count;
    const uint32_t *from, *to;
};

// Rows that read the blocks whose keys can score highest with their query, or keys plane by plane and the values that
// matter (kernels/base.py: Selection, Progress).
struct Selection {
    int64_t num_blocks = 0;          // 0: all blocks
    const uint8_t* rows = nullptr;   // [R]: 1 for sequences whose row, the only one, selects; null: none does
    float tau = 0, eps = 0;          // of rows that read plane by plane
    int64_t* tally = nullptr;        // [5]: what those read is added; null: nobody counts

    bool by_planes(int64_t sequence) const { return num_blocks == 0 && rows != nullptr && rows[sequence]; }
};

// Where the tokens of a step lie in one layer. With `tail`, new tokens go there, full strips are sealed, and a row reads
// the block of its own position there and earlier ones sealed; of sequence r, all blocks from open_from[r] on there.
struct LayerStrips {
    Strips strips;
    std::optional<Strips> tail;
    const int64_t* open_from;  // [R]; null: nothing stays open
    // [R, Hkv]: the place of each KV head in sealed strips; -1: it is gone and reads nothing; null: all are there.
    const int8_t* places;
    Seals seals;
    Selection selection;
    bool shares;  // strips that several sequences hold are read for all of them at once

    const Strips& open() const { return tail ? *tail : strips; }
};

// Throws std::invalid_argument when a block is not in its table or lies outside its range.
void check_strip(const Strips& strips, int64_t sequence, int64_t block);

// Both throw std::invalid_argument when a strip lies outside its range.
void append(const Step& step, const LayerStrips& layer, const Rows& k, const Rows& v);
void attend(const Step& step, const LayerStrips& layer, const Spec& spec, const Rows& q, const Rows& out, float* lse);

}  // namespace elbowroom

// Drawing tokens from logits, one work item a row; what it must do is written down in engine/drawing.py.
#pragma once

#include <cstdint>
#include <vector>

namespace elbowroom {

// How one row is drawn; the layout of `_RECORD` in kernels/sampling.py. 0 for top_k and top_p >= 1 cut nothing off.
struct Draw {
    double temperature;  // 0: greedy
    double top_p, min_p;
    int64_t top_k;
    uint64_t seed, sample;
};

inline constexpr int64_t kBroken = -1;

// A number in [0, 1) that depends on the three keys only.
double uniform(uint64_t seed, uint64_t sample, uint64_t position);

// Returns one token for each of the float32 logits [num_rows, vocab_size]; kBroken where the greatest is not finite or
// one is not a number. `positions` is the third key of each row's random number.
std::vector<int64_t> sample(const float* logits, int64_t row_stride, int64_t vocab_size, const Draw* draws,
                            const std::vector<uint64_t>& positions);

}  // namespace elbowroom

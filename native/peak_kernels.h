// What a peak is measured with, one instruction set at a time.
#pragma once

#include "simd.h"

namespace {

// Rounds of x = x * 0.5 + 0.5 in as many independent chains as keep the units busy (latency x units: 8 or more), and few
// enough for the registers. Returns the operations, two for each lane and chain; `sink` gets W results.
int64_t multiply_add(int64_t rounds, float* sink) {
    constexpr int kChains = 12;
    vf chains[kChains];
    for (int i = 0; i < kChains; ++i) chains[i] = splat(float(i));
    const vf half = splat(0.5f);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * half + half;
    }
    for (int i = 1; i < kChains; ++i) chains[0] += chains[i];
    store(sink, chains[0]);
    return rounds * kChains * W * 2;
}

}  // namespace

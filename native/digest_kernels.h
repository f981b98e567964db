// Bounds on the keys of strips, one instruction set at a time; kernels/digest.py says how digests lie.
//
// A digest holds the least and the greatest key of each channel and run of tokens, float16, rounded outwards. Sealed
// strips have none: their keys lie between a channel's minimum and as many of its scales above it as there are codes.
#pragma once

#include "layer_kernels.h"
#include "row_formats.h"
#include "simd.h"
#include "types.h"

namespace {

using elbowroom::kStripTokens;
using elbowroom::SealedHead;
using elbowroom::Strips;

// The least and the greatest key of the slots first .. end - 1 of a head, on top of those in low and high; infinite where
// one is not finite; channels as the model has them. Scratch: 3 rows.
void widen_bounds(const Strips& strips, char* strip, int head, int64_t first, int64_t end, float* low, float* high,
                  float* scratch) {
    const int64_t width = strips.head_dim;
    float *poison = scratch, *row = scratch + elbowroom::padded(width), *stored = row + elbowroom::padded(width);
    const int16_t* order = strips.order_of(head);
    for (int64_t d = 0; d < width; ++d) poison[d] = 0;
    for (int64_t slot = first; slot < end; ++slot) {
        const char* codes = strips.keys(strip, head) + slot * strips.key.code_stride(width);
        if (strips.plain()) {
            widen_row(codes, strips.dtype, row, width);
        } else {
            decode_rows(strips.key, codes, strips.key_scales(strip, head) + slot * strips.key.scale_stride(width), width, 1,
                        stored, width);
            for (int64_t d = 0; d < width; ++d) row[order == nullptr ? d : order[d]] = stored[d];
        }
        for (int64_t d = 0; d < width; ++d) {
            low[d] = row[d] < low[d] ? row[d] : low[d];
            high[d] = row[d] > high[d] ? row[d] : high[d];
            poison[d] += row[d] * 0.0f;  // NaN from here on where a key is not finite
        }
    }
    for (int64_t d = 0; d < width; ++d) {
        if (poison[d] == poison[d]) continue;
        low[d] = -__builtin_inff();
        high[d] = __builtin_inff();
    }
}

// Brings a head's digest up to date behind writing slots first .. stop - 1 of a strip that holds `held`: runs of which the
// first slot was written get bounds of their own, others are widened. Scratch: 5 rows.
void digest(const Strips& strips, char* strip, int head, int64_t first, int64_t stop, int64_t held, float* scratch) {
    const int64_t width = strips.head_dim, runs = strips.digest_runs(), size = kStripTokens / runs;
    float *low = scratch, *high = low + elbowroom::padded(width), *rest = high + elbowroom::padded(width);
    for (int64_t run = first / size; run * size < stop; ++run) {
        const int64_t begin = run * size, end = begin + size;
        const bool fresh = first <= begin;
        f16* stored_low = reinterpret_cast<f16*>(strips.digest(strip, head)) + 2 * run * width;
        f16* stored_high = stored_low + width;
        for (int64_t d = 0; d < width; ++d) {
            low[d] = fresh ? __builtin_inff() : widen_one(stored_low[d]);
            high[d] = fresh ? -__builtin_inff() : widen_one(stored_high[d]);
        }
        widen_bounds(strips, strip, head, fresh ? begin : first, min(end, fresh ? held : stop), low, high, rest);
        for (int64_t d = 0; d < width; ++d) {
            stored_low[d] = round_down(low[d]);
            stored_high[d] = round_up(high[d]);
        }
    }
}

// The bounds of a head of each strip, W channels of a run at a time.
struct DigestBounds {
    int64_t width, offset, runs;

    DigestBounds(const Strips& strips, int head) : width(strips.head_dim), runs(strips.digest_runs()) {
        offset = strips.strip_bytes() + head * runs * 4 * width;
    }

    void load_at(const char* data, int64_t run, int64_t d, vf* least, vf* greatest) const {
        const f16* low = reinterpret_cast<const f16*>(data) + 2 * run * width;
        *least = widen_padded(low, d, width);
        *greatest = widen_padded(low + width, d, width);
    }
};

struct SealedBounds {
    int64_t width, offset, runs;
    float levels;

    SealedBounds(const Strips& strips, int head) {
        const SealedHead format = strips.head();
        width = format.channels(), runs = format.key_groups(), levels = float((1 << format.key_bits) - 1);
        offset = head * format.bytes() + format.key_scales();
    }

    void load_at(const char* data, int64_t run, int64_t d, vf* least, vf* greatest) const {
        const f16 *scales = reinterpret_cast<const f16*>(data) + run * width, *minima = scales + runs * width;
        *least = widen_padded(minima, d, width);
        *greatest = *least + levels * widen_padded(scales, d, width);
    }
};

// The greatest bound of N query vectors with a run; q is [N][2][stride]: what is positive of each, then what is negative.
template <int N, class Bounds>
inline float bound_run(const Bounds& bounds, const char* data, int64_t run, const float* q, int64_t stride) {
    vf sums[N] = {};
    for (int64_t d = 0; d < bounds.width; d += W) {
        vf least, greatest;
        bounds.load_at(data, run, d, &least, &greatest);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const float* both = q + 2 * n * stride + d;
            sums[n] += load<vf>(both) * greatest + load<vf>(both + stride) * least;
        }
    }
    float most = -__builtin_inff();
    for (int n = 0; n < N; ++n) {
        const float sum = sum_lanes(sums[n]);
        most = sum <= most ? most : sum;
    }
    return most == most ? most : __builtin_inff();  // unknown: 0 times an infinite bound
}

inline float greater(float a, float b) { return a > b ? a : b; }

constexpr int64_t kBoundAhead = 6;  // strips whose bounds are asked for before they are needed: they lie far apart

template <class Bounds>
void bound_strips(const Strips& strips, const uint32_t* entries, int64_t count, int head, const float* q, int64_t group,
                  float* scores) {
    const Bounds bounds(strips, head);
    const auto at = [&](int64_t i) { return strips.base + entries[i] * elbowroom::kUnitBytes + bounds.offset; };
    const int64_t stride = elbowroom::padded(strips.head_dim), bytes = 4 * bounds.width * bounds.runs;
    for (int64_t i = 0; i < count; ++i) {
        if (i + kBoundAhead < count) {
            const char* ahead = at(i + kBoundAhead);
            for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(ahead + b, 0, 2);
        }
        const char* data = at(i);
        float most = -__builtin_inff();
        for (int64_t run = 0; run < bounds.runs; ++run) {
            int64_t n = 0;
            for (; n + 4 <= group; n += 4) most = greater(most, bound_run<4>(bounds, data, run, q + 2 * n * stride, stride));
            for (; n + 2 <= group; n += 2) most = greater(most, bound_run<2>(bounds, data, run, q + 2 * n * stride, stride));
            if (n < group) most = greater(most, bound_run<1>(bounds, data, run, q + 2 * n * stride, stride));
        }
        scores[i] = most;
    }
}

// Bounds on the scores of `group` query vectors (as `bound_strip` takes them) with the strips at `entries`.
void bound(const Strips& strips, const uint32_t* entries, int64_t count, int head, const float* q, int64_t group,
           float* scores) {
    strips.sealed() ? bound_strips<SealedBounds>(strips, entries, count, head, q, group, scores)
                    : bound_strips<DigestBounds>(strips, entries, count, head, q, group, scores);
}

}  // namespace

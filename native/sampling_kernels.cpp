// The inner loops of sampling, compiled once for each instruction set like kernels.cpp.
#include "kernels.h"
#include "simd.h"

namespace {

using elbowroom::kBlock;

// NaN counts as the highest, and sticks.
inline vf higher(vf a, vf b) { return (b > a) | (b != b) ? b : a; }

float maximum(const float* x, int64_t count) {
    if (count < W) {
        float top = x[0];
        for (int64_t i = 1; i < count; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
        return top;
    }
    vf top = load<vf>(x);
    for (int64_t i = W; i + W <= count; i += W) top = higher(top, load<vf>(x + i));
    top = higher(top, load<vf>(x + count - W));
    float result = top[0];
    for (int i = 1; i < W; ++i) result = top[i] > result || top[i] != top[i] ? top[i] : result;
    return result;
}

void block_maxima(const float* x, int64_t count, float* maxima) {
    for (int64_t start = 0; start < count; start += kBlock) {
        *maxima++ = maximum(x + start, count - start < kBlock ? count - start : kBlock);
    }
}

// Values x[0 .. W - 1]; minus infinity, which weighs nothing, from `count` on.
inline vf load_padded(const float* x, int64_t count) {
    if (count >= W) return load<vf>(x);
    float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = i < count ? x[i] : -__builtin_inff();
    return load<vf>(lanes);
}

// All passes over a row call this one function, so that a token has the same weight in each.
float weigh_block(const float* x, int64_t count, float top, float temperature, float* exponents, float* weights) {
    vf sums{};
    for (int64_t i = 0; i < count; i += W) {
        const vf exponent = (load_padded(x + i, count - i) - top) / temperature;
        const vf weight = vexp(exponent);
        store(exponents + i, exponent);
        store(weights + i, weight);
        sums += weight;
    }
    return sum_lanes(sums);
}

}  // namespace

namespace elbowroom {

extern const SamplingTable ELBOWROOM_SAMPLING;
const SamplingTable ELBOWROOM_SAMPLING = {block_maxima, weigh_block};

}  // namespace elbowroom

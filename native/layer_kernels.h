// What a decoder layer does beside products and attention: norms, activation, rotation, changes of layout and of dtype.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "tile.h"

namespace {

using elbowroom::Activation;
using elbowroom::kPanelTokens;

inline float inverse_rms(float squares, int64_t width, float eps) {
    return 1.0f / __builtin_sqrtf(squares / float(width) + eps);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t width, float* out) {
    const int64_t whole = width / W * W;
    vf sums{};
    for (int64_t i = 0; i < whole; i += W) sums += load<vf>(x + i) * load<vf>(x + i);
    float squares = sum_lanes(sums);
    for (int64_t i = whole; i < width; ++i) squares += x[i] * x[i];
    const float scale = inverse_rms(squares, width, eps);
    for (int64_t i = 0; i < whole; i += W) store(out + i, load<vf>(x + i) * scale * load<vf>(weight + i));
    for (int64_t i = whole; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

// x and out [width][16]: each lane is a token.
void rms_norm_panel(const float* x, const float* weight, float eps, int64_t width, float* out) {
    for (int64_t lane = 0; lane < kPanelTokens; lane += W) {
        vf squares{};
        for (int64_t i = 0; i < width; ++i) {
            const vf value = load<vf>(x + i * kPanelTokens + lane);
            squares += value * value;
        }
        vf scale;
        for (int j = 0; j < W; ++j) scale[j] = inverse_rms(squares[j], width, eps);
        for (int64_t i = 0; i < width; ++i) {
            store(out + i * kPanelTokens + lane, load<vf>(x + i * kPanelTokens + lane) * scale * weight[i]);
        }
    }
}

inline vf activate(vf x, Activation activation) {
    if (activation == Activation::silu) return x / (1.0f + vexp(-vmax(x, splat(-80.0f))));
    return 0.5f * x * (1.0f + vtanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}

// values = activation(values) * up.
void gate(float* values, const float* up, int64_t count, Activation activation) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        store(values + i, activate(load<vf>(values + i), activation) * load<vf>(up + i));
    }
    if (i < count) {
        const vf last = activate(widen_padded(values, i, count), activation) * widen_padded(up, i, count);
        for (int64_t j = i; j < count; ++j) values[j] = last[j - i];
    }
}

// Pairs (i, i + width / 2) turn by the angle whose cosine and sine are given for each pair.
void rotate(float* head, const float* cos, const float* sin, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i] + low * sin[i];
    }
}

void softcap(float* x, int64_t count, float cap) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(x + i, vtanh(load<vf>(x + i) / cap) * cap);
    if (i < count) {
        const vf last = vtanh(widen_padded(x, i, count) / cap) * cap;
        for (int64_t j = i; j < count; ++j) x[j] = last[j - i];
    }
}

// Row tokens of `stride` floats -> a panel [count][16]; lanes without a token become 0.
void to_panel(const float* rows, int64_t stride, int64_t num_tokens, int64_t count, float* panel) {
    for (int64_t lane = 0; lane < kPanelTokens; lane += W) {
        for (int64_t i = 0; i < count; i += W) {
            vf block[W];
            for (int j = 0; j < W; ++j) {
                block[j] = lane + j < num_tokens ? widen_padded(rows + (lane + j) * stride, i, count) : vf{};
            }
            transpose(block);
            const int64_t filled = min(W, count - i);
            for (int64_t j = 0; j < filled; ++j) store(panel + (i + j) * kPanelTokens + lane, block[j]);
        }
    }
}

// The way back, for the tokens that are there.
void to_rows(const float* panel, int64_t count, int64_t num_tokens, float* rows, int64_t stride) {
    for (int64_t lane = 0; lane < num_tokens; lane += W) {
        const int64_t tokens = min(W, num_tokens - lane);
        for (int64_t i = 0; i < count; i += W) {
            const int64_t filled = min(W, count - i);
            vf block[W];
            for (int j = 0; j < W; ++j) {
                block[j] = j < filled ? load<vf>(panel + (i + j) * kPanelTokens + lane) : vf{};
            }
            transpose(block);
            for (int64_t t = 0; t < tokens; ++t) {
                float* row = rows + (lane + t) * stride + i;
                if (filled == W) {
                    store(row, block[t]);
                } else {
                    for (int64_t j = 0; j < filled; ++j) row[j] = block[t][j];
                }
            }
        }
    }
}

void widen_row(const char* source, DType dtype, float* target, int64_t count) {
    with_type(dtype, [&]<class T>(const T*) {
        const T* row = reinterpret_cast<const T*>(source);
        int64_t i = 0;
        for (; i + W <= count; i += W) store(target + i, widen(row + i));
        for (; i < count; ++i) target[i] = widen_one(row[i]);
    });
}

template <class From, class To>
void convert_rows(const char* source, char* target, int64_t count) {
    const From* from = reinterpret_cast<const From*>(source);
    To* to = reinterpret_cast<To*>(target);
    for (int64_t i = 0; i < count; ++i) narrow(widen_one(from[i]), to + i);
}

template <class From>
void convert_from(const char* source, char* target, DType to, int64_t count) {
    switch (to) {
        case DType::float32: return convert_rows<From, float>(source, target, count);
        case DType::bfloat16: return convert_rows<From, bf16>(source, target, count);
        case DType::float16: return convert_rows<From, f16>(source, target, count);
    }
}

void convert(const char* source, DType from, char* target, DType to, int64_t count) {
    if (from == to) {
        __builtin_memcpy(target, source, count * size_of(from));
        return;
    }
    switch (from) {
        case DType::float32: return convert_from<float>(source, target, to, count);
        case DType::bfloat16: return convert_from<bf16>(source, target, to, count);
        case DType::float16: return convert_from<f16>(source, target, to, count);
    }
}

}  // namespace

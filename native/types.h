// The plain descriptors that cross the seam: what Python says about a step, its strips, a layer and row tensors.
#pragma once

#include <algorithm>
#include <cstdint>

namespace elbowroom {

inline constexpr int kStripTokens = 64;
inline constexpr int64_t kUnitBytes = 64;  // strip tables count in these

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

inline constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Which rows belong to which sequence, and what they may read (see kernels/base.py: StripStep).
struct Step {
    int64_t num_sequences;
    const int32_t* row_starts;   // [R + 1]
    const int64_t* positions;    // [N]
    const int64_t* lengths;      // [R]
    const int64_t* first_slots;  // [R]
};

// How one head of one token becomes bytes: codes, and scales in an array of their own (kv/codecs/rows.py).
enum class RowKind : int { plain = 0, int8 = 1, fp8 = 2, bfp = 3, kivi = 4, planes = 5 };

struct RowFormat {
    RowKind kind;
    int bits;   // of a code
    int block;  // codes that share a scale; 0: all
    int64_t slots = 0;  // heads x tokens of a strip: how far apart planes lie, and the numbers of a group

    int64_t code_bytes(int64_t width) const { return width * bits / 8; }
    int64_t scale_bytes(int64_t width) const {
        if (kind == RowKind::planes) return width / block * 4;
        return kind == RowKind::int8 ? 2 : kind == RowKind::bfp ? width / block : 0;
    }
    // From one token to the next, where a head's codes (of planes: the high halves) and its scales begin.
    int64_t code_stride(int64_t width) const { return kind == RowKind::planes ? width / 2 : code_bytes(width); }
    int64_t scale_stride(int64_t width) const { return kind == RowKind::planes ? 2 : scale_bytes(width); }
    // Of planes: from a high half to its low one; from a group's scale to its minimum, and on to the next group's scale.
    int64_t low_at(int64_t width) const { return slots * width / 2; }
    int64_t number_stride() const { return slots * 2; }
    int64_t bytes(int64_t width) const { return code_bytes(width) + scale_bytes(width); }
};

// One head of a sealed strip (kv/codecs/kivi.py): codes of keys, scales and minima of each channel; codes of values,
// scales and minima of each token. Scales and minima are float16; a scale is shared by `group` tokens or channels.
struct SealedHead {
    int64_t head_dim, v_head_dim, group;
    int key_bits, value_bits;

    static constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
    int64_t channels() const { return up(head_dim, 4); }
    int64_t key_quads() const { return channels() / 4; }
    int64_t key_quad_bytes() const { return 4 * kStripTokens * key_bits / 8; }
    int64_t key_groups() const { return kStripTokens / group; }
    int64_t value_quad_bytes() const { return 4 * up(v_head_dim, 32) * value_bits / 8; }
    int64_t value_groups() const { return up(v_head_dim, group) / group; }
    int64_t key_scales() const { return key_quads() * key_quad_bytes(); }
    int64_t key_minima() const { return key_scales() + key_groups() * channels() * 2; }
    int64_t values() const { return key_minima() + key_groups() * channels() * 2; }
    int64_t value_scales() const { return values() + kStripTokens / 4 * value_quad_bytes(); }
    int64_t value_minima() const { return value_scales() + value_groups() * kStripTokens * 2; }
    int64_t bytes() const { return value_minima() + value_groups() * kStripTokens * 2; }
};

// Strips of one layer: block b of a sequence lies at base + 64 * table[sequence][b - first_blocks[sequence]]. Arrays
// [Hkv, 64, bytes] of key codes, key scales, value codes and value scales; codes of plain strips are elements of `dtype`.
// Keys in planes have an array of high halves and one of low ones, then two of float16 for each group: scales, minima.
// Sealed strips hold one head behind the other. Where a policy has dropped channels of keys, head_dim is what is left;
// where it has dropped KV heads, num_kv_heads is.
struct Strips {
    const uint32_t* table;        // [R, num_blocks]
    const int64_t* first_blocks;  // [R]; null: 0
    int64_t num_blocks;
    char* base;
    int64_t num_bytes;
    DType dtype;
    int num_kv_heads, head_dim, v_head_dim;
    RowFormat key, value;
    int64_t digest_bytes;  // bounds on the keys [Hkv, runs, 2, Dk] behind all that, float16; 0: none
    const int16_t* order;  // [Hkv, Dk]: the channel at each place of an encoded key; null: as they come
    int64_t channels_at;   // byte of a strip at which its keys' channels [Hkv, Dk] lie, uint8; 0: all are there
    int64_t counts_at;     // byte of a strip at which the tokens of its slots [Hkv, 64] lie, uint8; 0: one each
    int64_t heads_at;      // byte of a strip at which the KV heads [Hkv] lie that it holds, uint8; 0: all of the layer's
    bool by_token;         // plain strips only: a token's keys of all heads, then its values, then the next token

    const uint8_t* channels(const char* strip, int head) const {
        return channels_at == 0 ? nullptr : reinterpret_cast<const uint8_t*>(strip + channels_at) + head * int64_t{head_dim};
    }
    const uint8_t* counts(const char* strip, int head) const {
        return counts_at == 0 ? nullptr : reinterpret_cast<const uint8_t*>(strip + counts_at) + head * kStripTokens;
    }
    // The layer's KV head that lies at a place of a strip.
    int head_at(const char* strip, int place) const {
        return heads_at == 0 ? place : reinterpret_cast<const uint8_t*>(strip + heads_at)[place];
    }
    // Bytes with what a strip says about itself.
    int64_t whole_bytes() const {
        const int64_t channels = channels_at == 0 ? 0 : channels_at + num_kv_heads * int64_t{head_dim};
        const int64_t counts = counts_at == 0 ? 0 : counts_at + num_kv_heads * int64_t{kStripTokens};
        const int64_t heads = heads_at == 0 ? 0 : heads_at + num_kv_heads;
        return std::max({channels, counts, heads, strip_bytes() + digest_bytes});
    }
    const int16_t* order_of(int head) const { return order == nullptr ? nullptr : order + head * int64_t{head_dim}; }
    bool plain() const { return key.kind == RowKind::plain; }
    bool sealed() const { return key.kind == RowKind::kivi; }
    bool planes() const { return key.kind == RowKind::planes; }
    bool coded() const {  // integers, token by token
        return key.kind == RowKind::int8 || key.kind == RowKind::bfp || planes();
    }
    bool decoded() const { return key.kind == RowKind::fp8; }  // read as floats
    SealedHead head() const { return {head_dim, v_head_dim, key.block, key.bits, value.bits}; }
    int64_t slots() const { return int64_t{num_kv_heads} * kStripTokens; }
    int64_t strip_bytes() const {
        if (sealed()) return num_kv_heads * head().bytes();
        return slots() * (key.bytes(head_dim) + value.bytes(v_head_dim));
    }
    int64_t column(int64_t sequence, int64_t block) const {
        return first_blocks == nullptr ? block : block - first_blocks[sequence];
    }
    int64_t start(int64_t sequence, int64_t block) const {
        return table[sequence * num_blocks + column(sequence, block)] * kUnitBytes;
    }
    char* strip(int64_t sequence, int64_t block) const { return base + start(sequence, block); }
    // From one token to the next in the array of a head.
    int64_t token_bytes() const { return num_kv_heads * (key.code_bytes(head_dim) + value.code_bytes(v_head_dim)); }
    int64_t key_stride() const { return by_token ? token_bytes() : key.code_stride(head_dim); }
    int64_t value_stride() const { return by_token ? token_bytes() : value.code_stride(v_head_dim); }
    char* keys(char* strip, int head) const {
        if (by_token) return strip + head * key.code_bytes(head_dim);
        return strip + head * kStripTokens * key.code_stride(head_dim);
    }
    char* key_scales(char* strip, int head) const {
        return strip + slots() * key.code_bytes(head_dim) + head * kStripTokens * key.scale_stride(head_dim);
    }
    char* values(char* strip, int head) const {
        if (by_token) return strip + num_kv_heads * key.code_bytes(head_dim) + head * value.code_bytes(v_head_dim);
        return strip + slots() * key.bytes(head_dim) + head * kStripTokens * value.code_bytes(v_head_dim);
    }
    int64_t digest_runs() const { return digest_bytes / (4 * int64_t{num_kv_heads} * head_dim); }
    char* digest(char* strip, int head) const { return strip + strip_bytes() + head * (digest_bytes / num_kv_heads); }
    char* value_scales(char* strip, int head) const {
        return strip + slots() * (key.bytes(head_dim) + value.code_bytes(v_head_dim)) +
               head * kStripTokens * value.scale_bytes(v_head_dim);
    }
};

// Attention of one layer.
struct Spec {
    int num_q_heads;
    int64_t window;  // tokens; 0: everything
    float scale;
    float softcap;  // 0: none
};

// A tensor [rows, heads, width] whose last stride is 1; strides in elements.
struct Rows {
    char* data;
    DType dtype;
    int64_t row_stride, head_stride;

    char* at(int64_t row, int64_t head) const {
        return data + (row * row_stride + head * head_stride) * size_of(dtype);
    }
};

enum class Activation : int { silu = 0, gelu_tanh = 1 };

// A dense matrix of weights [rows, cols]; y = W x + bias.
struct Matrix {
    const char* data;
    int64_t rows, cols, row_bytes;
    DType dtype;
    const float* bias;  // [rows]; null: none

    const char* row(int64_t index) const { return data + index * row_bytes; }
};

}  // namespace elbowroom

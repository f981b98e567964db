// A decoder from plain descriptors: what models/decoder.py computes in torch, as a few calls that use the pool.
//
// Activations are float32, whatever the weights are. Few tokens of a pass lie in rows [N, width], more in panels
// [width][16] (in_rows in product.h). Queries, keys, values and attention outputs always lie in rows.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "product.h"
#include "types.h"

namespace elbowroom {

enum class Part { q, k, v };

// One head of a layer's projections: rows first .. first + width - 1 of the matrix of its part.
struct Head {
    Part part;
    int64_t first, width;
};

struct LayerWeights {
    Matrix q, k, v, o, gate, up, down;
    // Weights of RMS norms, ready to multiply; empty: the layer has no such norm.
    std::vector<float> input_norm, ffn_norm, attention_out_norm, ffn_out_norm, q_norm, k_norm;
    Spec spec;
    int num_kv_heads, head_dim, v_head_dim;
    int rope;  // index into the model's ropes; -1: none

    int64_t q_width() const { return int64_t{spec.num_q_heads} * head_dim; }
    int64_t k_width() const { return int64_t{num_kv_heads} * head_dim; }
    int64_t v_width() const { return int64_t{num_kv_heads} * v_head_dim; }
    int64_t out_width() const { return int64_t{spec.num_q_heads} * v_head_dim; }
    int num_heads() const { return spec.num_q_heads + 2 * num_kv_heads; }

    // Heads in the order q, k, v.
    Head head(int64_t index) const {
        if (index < spec.num_q_heads) return {Part::q, index * head_dim, head_dim};
        index -= spec.num_q_heads;
        if (index < num_kv_heads) return {Part::k, index * head_dim, head_dim};
        return {Part::v, (index - num_kv_heads) * v_head_dim, v_head_dim};
    }
};

struct Rope {
    std::vector<float> frequencies;  // radians a token, one for each pair
    float factor;                    // on cosine and sine
};

struct ModelWeights {
    Matrix embed, head;
    std::vector<float> final_norm;
    float embed_scale, eps;
    float final_softcap;  // 0: none
    Activation activation;
    std::vector<Rope> ropes;
    std::vector<LayerWeights> layers;
};

// Memory for one pass of N tokens (N16: rounded up to 16, d: hidden size), all float32.
struct Buffers {
    float* hidden;      // N16 * d: the residual stream
    float* input;       // N16 * max(d, attention output)
    float* branch;      // N16 * d: output of a block that has a norm of its own; rows of the head
    float* projected;   // N16 * (q + k + v widths)
    float *q, *k, *v;   // N rows of each
    float* attention;   // N rows of the attention output
    float* ffn;         // N16 * FFN width
    float* angles;      // for each rope, N * its head width: cosines, then sines
};

class Decoder {
   public:
    explicit Decoder(ModelWeights model) : model_(std::move(model)) {}
    void add(LayerWeights layer) { model_.layers.push_back(std::move(layer)); }

    // Starts a pass: embeds the tokens and turns positions into angles. Buffers stay in use until the next pass.
    // Throws std::invalid_argument for a token outside the vocabulary.
    void begin(const int64_t* tokens, const int64_t* positions, int64_t num_tokens, const Buffers& buffers);

    // Norm, projections, QK norm and rotation of a layer: fills q, k and v.
    void project(int64_t index) const;
    // Output projection of what lies in `attention`, then the FFN, each with its residual sum.
    void finish(int64_t index) const;
    // A whole layer over plain strips; `append_kv` is false where the layer reads another layer's keys and values.
    // Throws std::invalid_argument when a strip lies outside its range.
    void layer(int64_t index, const Step& step, const LayerStrips& strips, bool append_kv) const;

    // Logits [count, vocabulary] of the given tokens of the pass, in any order and any number of times.
    // Throws std::invalid_argument for a row outside the pass.
    void logits(const int64_t* rows, int64_t count, float* out) const;

   private:
    bool few() const { return in_rows(num_tokens_); }
    int64_t num_panels() const { return (num_tokens_ + kPanelTokens - 1) / kPanelTokens; }
    template <class T>
    static T* panel_of(T* panels, int64_t width, int64_t index) {
        return panels + index * width * kPanelTokens;
    }
    float* rows_of(Part part) const { return part == Part::q ? buffers_.q : part == Part::k ? buffers_.k : buffers_.v; }
    static int64_t row_width(const LayerWeights& layer, Part part) {
        return part == Part::q ? layer.q_width() : part == Part::k ? layer.k_width() : layer.v_width();
    }

    void embed_row(int64_t token, float* row) const;
    void set_angles(int64_t token, int64_t position) const;
    const float* angles(int rope, int64_t token) const;
    void norm(const float* x, const std::vector<float>& weight, float* out) const;
    void add_block(const Matrix& matrix, const float* x, const std::vector<float>& out_norm) const;
    void project_rows(const LayerWeights& layer) const;
    void finish_head(const LayerWeights& layer, Part part, int64_t token, float* row) const;
    void gated(const LayerWeights& layer) const;
    void logits_block(const int64_t* rows, int64_t count, float* out) const;
    void load_hidden(int64_t token, float* row) const;

    ModelWeights model_;
    int64_t num_tokens_ = 0;
    Buffers buffers_{};
};

}  // namespace elbowroom

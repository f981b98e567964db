#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "isa.h"
#include "parallel.h"

namespace elbowroom {

void Decoder::begin(const int64_t* tokens, const int64_t* positions, int64_t num_tokens, const Buffers& buffers) {
    const Matrix& embed = model_.embed;
    for (int64_t n = 0; n < num_tokens; ++n) {
        if (tokens[n] < 0 || tokens[n] >= embed.rows) {
            throw std::invalid_argument("token " + std::to_string(tokens[n]) + " is not in a vocabulary of " +
                                        std::to_string(embed.rows));
        }
    }
    num_tokens_ = num_tokens;
    buffers_ = buffers;
    if (few()) {
        for (int64_t n = 0; n < num_tokens; ++n) embed_row(tokens[n], buffers.hidden + n * embed.cols);
    } else {
        parallel(num_panels(), kPanelTokens * embed.cols, [&](int64_t panel, float* rows) {
            const int64_t first = panel * kPanelTokens, count = std::min(kPanelTokens, num_tokens - first);
            for (int64_t n = 0; n < count; ++n) embed_row(tokens[first + n], rows + n * embed.cols);
            kernels().to_panel(rows, embed.cols, count, embed.cols, panel_of(buffers.hidden, embed.cols, panel));
        });
    }
    parallel(num_panels(), 0, [&](int64_t panel, float*) {
        const int64_t first = panel * kPanelTokens, end = std::min(num_tokens, first + kPanelTokens);
        for (int64_t n = first; n < end; ++n) set_angles(n, positions[n]);
    });
}

void Decoder::embed_row(int64_t token, float* row) const {
    const Matrix& embed = model_.embed;
    kernels().widen(embed.row(token), embed.dtype, row, embed.cols);
    if (model_.embed_scale == 1.0f) return;
    for (int64_t i = 0; i < embed.cols; ++i) row[i] *= model_.embed_scale;
}

void Decoder::set_angles(int64_t token, int64_t position) const {
    float* angles = buffers_.angles;
    for (const Rope& rope : model_.ropes) {
        const int64_t half = int64_t(rope.frequencies.size());
        float* cos = angles + token * 2 * half;
        for (int64_t i = 0; i < half; ++i) {
            const float angle = float(position) * rope.frequencies[size_t(i)];
            cos[i] = std::cos(angle) * rope.factor;
            cos[half + i] = std::sin(angle) * rope.factor;
        }
        angles += num_tokens_ * 2 * half;
    }
}

const float* Decoder::angles(int rope, int64_t token) const {
    const float* angles = buffers_.angles;
    for (int i = 0; i < rope; ++i) angles += num_tokens_ * 2 * int64_t(model_.ropes[size_t(i)].frequencies.size());
    return angles + token * 2 * int64_t(model_.ropes[size_t(rope)].frequencies.size());
}

// --- one operation on all tokens of the pass, in either layout ---------------------------------------------------------

void Decoder::norm(const float* x, const std::vector<float>& weight, float* out) const {
    const int64_t width = int64_t(weight.size());
    if (few()) {
        for (int64_t n = 0; n < num_tokens_; ++n) {
            kernels().rms_norm(x + n * width, weight.data(), model_.eps, width, out + n * width);
        }
        return;
    }
    parallel(num_panels(), 0, [&](int64_t panel, float*) {
        kernels().rms_norm_panel(panel_of(x, width, panel), weight.data(), model_.eps, width,
                                 panel_of(out, width, panel));
    });
}

// hidden += W x, with a norm of its own between where the family has one.
void Decoder::add_block(const Matrix& matrix, const float* x, const std::vector<float>& out_norm) const {
    if (out_norm.empty()) return multiply({{matrix, buffers_.hidden, matrix.rows}}, x, num_tokens_, true);
    multiply({{matrix, buffers_.branch, matrix.rows}}, x, num_tokens_, false);
    norm(buffers_.branch, out_norm, buffers_.branch);
    const int64_t tokens = few() ? 1 : kPanelTokens;
    parallel(few() ? num_tokens_ : num_panels(), 0, [&](int64_t item, float*) {
        const int64_t first = item * tokens * matrix.rows;
        for (int64_t i = first; i < first + tokens * matrix.rows; ++i) buffers_.hidden[i] += buffers_.branch[i];
    });
}

// --- a layer -----------------------------------------------------------------------------------------------------------

void Decoder::project(int64_t index) const {
    const LayerWeights& layer = model_.layers[size_t(index)];
    norm(buffers_.hidden, layer.input_norm, buffers_.input);
    if (few()) return project_rows(layer);
    const int64_t q = layer.q_width(), k = layer.k_width(), v = layer.v_width(), width = q + k + v;
    float* out = buffers_.projected;
    multiply({{layer.q, out, width}, {layer.k, out + q * kPanelTokens, width},
              {layer.v, out + (q + k) * kPanelTokens, width}}, buffers_.input, num_tokens_, false);
    const int heads = layer.num_heads();
    parallel(num_panels() * heads, 0, [&](int64_t item, float*) {
        const int64_t panel = item / heads, first = panel * kPanelTokens;
        const Head head = layer.head(item % heads);
        const int64_t count = std::min(kPanelTokens, num_tokens_ - first), stride = row_width(layer, head.part);
        float* rows = rows_of(head.part) + first * stride + head.first;
        const int64_t column = head.first + (head.part == Part::q ? 0 : head.part == Part::k ? q : q + k);
        kernels().to_rows(panel_of(out, width, panel) + column * kPanelTokens, head.width, count, rows, stride);
        for (int64_t n = 0; n < count; ++n) finish_head(layer, head.part, first + n, rows + n * stride);
    });
}

// An item is a head: its rows of weights, then norm and rotation while it is in the cache.
void Decoder::project_rows(const LayerWeights& layer) const {
    const float* x = arranged(layer.q, buffers_.input, num_tokens_);
    parallel(layer.num_heads(), 0, [&](int64_t item, float*) {
        const Head head = layer.head(item);
        const int64_t stride = row_width(layer, head.part);
        float* rows = rows_of(head.part) + head.first;
        const Matrix& matrix = head.part == Part::q ? layer.q : head.part == Part::k ? layer.k : layer.v;
        kernels().dot(matrix, head.first, head.first + head.width, x, num_tokens_, rows, stride, false);
        for (int64_t n = 0; n < num_tokens_; ++n) finish_head(layer, head.part, n, rows + n * stride);
    });
}

void Decoder::finish_head(const LayerWeights& layer, Part part, int64_t token, float* row) const {
    if (part == Part::v) return;
    const std::vector<float>& weight = part == Part::q ? layer.q_norm : layer.k_norm;
    if (!weight.empty()) kernels().rms_norm(row, weight.data(), model_.eps, layer.head_dim, row);
    if (layer.rope < 0) return;
    const float* cos = angles(layer.rope, token);
    kernels().rotate(row, cos, cos + layer.head_dim / 2, layer.head_dim);
}

void Decoder::finish(int64_t index) const {
    const LayerWeights& layer = model_.layers[size_t(index)];
    const float* attention = buffers_.attention;
    const int64_t width = layer.out_width();
    if (!few()) {
        parallel(num_panels(), 0, [&](int64_t panel, float*) {
            const int64_t first = panel * kPanelTokens, count = std::min(kPanelTokens, num_tokens_ - first);
            kernels().to_panel(attention + first * width, width, count, width, panel_of(buffers_.input, width, panel));
        });
        attention = buffers_.input;
    }
    add_block(layer.o, attention, layer.attention_out_norm);
    norm(buffers_.hidden, layer.ffn_norm, buffers_.input);
    gated(layer);
    add_block(layer.down, buffers_.ffn, layer.ffn_out_norm);
}

// ffn = act(gate x) * up x: both products of a range of rows, then the activation while they are in the cache.
void Decoder::gated(const LayerWeights& layer) const {
    const int64_t width = layer.gate.rows, tokens = few() ? num_tokens_ : num_panels() * kPanelTokens;
    const int64_t rows = rows_per_item(layer.gate, few());
    const int64_t scratch_floats = rows * (tokens + (few() ? 0 : kMultiplyDepth));
    const float* x = few() ? arranged(layer.gate, buffers_.input, num_tokens_) : buffers_.input;
    parallel(ceil_div(width, rows), scratch_floats, [&](int64_t item, float* up) {
        const int64_t first = item * rows, end = std::min(width, first + rows), count = end - first;
        const KernelTable& use = kernels();
        if (few()) {
            use.dot(layer.gate, first, end, x, num_tokens_, buffers_.ffn + first, width, false);
            use.dot(layer.up, first, end, x, num_tokens_, up, count, false);
            for (int64_t n = 0; n < num_tokens_; ++n) {
                use.gate(buffers_.ffn + n * width + first, up + n * count, count, model_.activation);
            }
            return;
        }
        const int64_t panels = num_panels(), panel_floats = count * kPanelTokens;
        float* scratch = up + rows * tokens;
        float* out = buffers_.ffn + first * kPanelTokens;
        use.multiply(layer.gate, first, end, x, panels, out, width * kPanelTokens, false, scratch);
        use.multiply(layer.up, first, end, x, panels, up, panel_floats, false, scratch);
        for (int64_t p = 0; p < panels; ++p) {
            use.gate(panel_of(out, width, p), up + p * panel_floats, panel_floats, model_.activation);
        }
    });
}

void Decoder::layer(int64_t index, const Step& step, const LayerStrips& strips, bool append_kv) const {
    const LayerWeights& layer = model_.layers[size_t(index)];
    const auto rows = [](float* data, int64_t width, int64_t head_width) {
        return Rows{reinterpret_cast<char*>(data), DType::float32, width, head_width};
    };
    project(index);
    if (append_kv) {
        append(step, strips, rows(buffers_.k, layer.k_width(), layer.head_dim),
               rows(buffers_.v, layer.v_width(), layer.v_head_dim));
    }
    attend(step, strips, layer.spec, rows(buffers_.q, layer.q_width(), layer.head_dim),
           rows(buffers_.attention, layer.out_width(), layer.v_head_dim), nullptr);
    finish(index);
}

// --- the head ----------------------------------------------------------------------------------------------------------

void Decoder::logits(const int64_t* rows, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; ++i) {
        if (rows[i] < 0 || rows[i] >= num_tokens_) {
            throw std::invalid_argument("row " + std::to_string(rows[i]) + " is not in a pass of " +
                                        std::to_string(num_tokens_) + " tokens");
        }
    }
    const int64_t most = num_panels() * kPanelTokens;  // rows that the buffers hold; more only where rows repeat
    for (int64_t i = 0; i < count; i += most) {
        logits_block(rows + i, std::min(most, count - i), out + i * model_.head.rows);
    }
}

void Decoder::logits_block(const int64_t* rows, int64_t count, float* out) const {
    const int64_t width = model_.embed.cols, vocabulary = model_.head.rows;
    float* normed = buffers_.branch;
    for (int64_t i = 0; i < count; ++i) {
        load_hidden(rows[i], normed + i * width);
        kernels().rms_norm(normed + i * width, model_.final_norm.data(), model_.eps, width, normed + i * width);
    }
    const bool rowwise = in_rows(count);
    const int64_t panels = ceil_div(count, kPanelTokens);
    if (!rowwise) {
        for (int64_t p = 0; p < panels; ++p) {
            kernels().to_panel(normed + p * kPanelTokens * width, width, std::min(kPanelTokens, count - p * kPanelTokens),
                               width, panel_of(buffers_.input, width, p));
        }
    }
    const float* x = rowwise ? arranged(model_.head, normed, count) : buffers_.input;
    const int64_t item_rows = rows_per_item(model_.head, rowwise);
    const int64_t scratch_floats = rowwise ? 0 : item_rows * (kMultiplyDepth + panels * kPanelTokens);
    parallel(ceil_div(vocabulary, item_rows), scratch_floats, [&](int64_t item, float* scratch) {
        const int64_t first = item * item_rows, end = std::min(vocabulary, first + item_rows), wide = end - first;
        if (rowwise) {
            kernels().dot(model_.head, first, end, x, count, out + first, vocabulary, false);
        } else {
            float* result = scratch + item_rows * kMultiplyDepth;
            kernels().multiply(model_.head, first, end, x, panels, result, wide * kPanelTokens, false,
                               scratch);
            for (int64_t p = 0; p < panels; ++p) {
                const int64_t token = p * kPanelTokens;
                kernels().to_rows(panel_of(result, wide, p), wide, std::min(kPanelTokens, count - token),
                                  out + token * vocabulary + first, vocabulary);
            }
        }
        if (model_.final_softcap <= 0) return;
        for (int64_t i = 0; i < count; ++i) kernels().softcap(out + i * vocabulary + first, wide, model_.final_softcap);
    });
}

void Decoder::load_hidden(int64_t token, float* row) const {
    const int64_t width = model_.embed.cols;
    if (few()) {
        std::copy_n(buffers_.hidden + token * width, width, row);
        return;
    }
    const float* panel = panel_of(buffers_.hidden, width, token / kPanelTokens);
    for (int64_t i = 0; i < width; ++i) row[i] = panel[i * kPanelTokens + token % kPanelTokens];
}

}  // namespace elbowroom

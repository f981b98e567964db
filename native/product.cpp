#include "product.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace elbowroom {
namespace {

constexpr int64_t kItemBytes = 96 * 1024;  // weights of an item: long enough to stream, short enough to balance
constexpr int64_t kItemRows = 48;          // rows of weights of an item that many tokens share: widened, they fit L2
constexpr int64_t kRowStep = 12;           // whole register tiles

}  // namespace

int64_t rows_per_item(const Matrix& matrix, bool few_tokens) {
    // A matrix without rows, or one whose rows are all the same one, still has items of some rows.
    const int64_t most = few_tokens ? kItemBytes / std::max<int64_t>(matrix.row_bytes, 1) : kItemRows;
    const int64_t balanced = ceil_div(matrix.rows, int64_t{4} * Pool::instance().num_threads());
    return ceil_div(std::max<int64_t>(std::min(balanced, most), 1), kRowStep) * kRowStep;
}

const float* arranged(const Matrix& matrix, const float* x, int64_t num_tokens) {
    static thread_local std::vector<float> buffer;
    buffer.resize(size_t(num_tokens * padded(matrix.cols)));
    kernels().arrange(matrix, x, num_tokens, buffer.data());
    return buffer.data();
}

void multiply(std::initializer_list<Product> products, const float* x, int64_t num_tokens, bool add) {
    const bool few = in_rows(num_tokens);
    const int64_t num_panels = ceil_div(num_tokens, kPanelTokens);
    int64_t num_items = 0, most_rows = 0;
    for (const Product& product : products) {
        const int64_t rows = rows_per_item(product.matrix, few);
        num_items += ceil_div(product.matrix.rows, rows);
        most_rows = std::max(most_rows, rows);
    }
    if (few) x = arranged(products.begin()->matrix, x, num_tokens);
    parallel(num_items, few ? 0 : most_rows * kMultiplyDepth, [&](int64_t item, float* scratch) {
        for (const Product& product : products) {
            const int64_t rows = rows_per_item(product.matrix, few), items = ceil_div(product.matrix.rows, rows);
            if (item >= items) {
                item -= items;
                continue;
            }
            const int64_t first = item * rows, end = std::min(product.matrix.rows, first + rows);
            if (few) {
                kernels().dot(product.matrix, first, end, x, num_tokens, product.y + first, product.stride, add);
            } else {
                kernels().multiply(product.matrix, first, end, x, num_panels, product.y + first * kPanelTokens,
                                   product.stride * kPanelTokens, add, scratch);
            }
            return;
        }
    });
}

void multiply_rows(const Matrix& matrix, const float* x, int64_t num_tokens, float* y) {
    if (in_rows(num_tokens)) return multiply({{matrix, y, matrix.rows}}, x, num_tokens, false);
    const int64_t num_panels = ceil_div(num_tokens, kPanelTokens), panel_in = matrix.cols * kPanelTokens,
                  panel_out = matrix.rows * kPanelTokens;
    std::vector<float> in(size_t(num_panels * panel_in)), out(size_t(num_panels * panel_out));
    const auto tokens_of = [&](int64_t panel) { return std::min(kPanelTokens, num_tokens - panel * kPanelTokens); };
    parallel(num_panels, 0, [&](int64_t p, float*) {
        const float* rows = x + p * kPanelTokens * matrix.cols;
        kernels().to_panel(rows, matrix.cols, tokens_of(p), matrix.cols, in.data() + p * panel_in);
    });
    multiply({{matrix, out.data(), matrix.rows}}, in.data(), num_tokens, false);
    parallel(num_panels, 0, [&](int64_t p, float*) {
        float* rows = y + p * kPanelTokens * matrix.rows;
        kernels().to_rows(out.data() + p * panel_out, matrix.rows, tokens_of(p), rows, matrix.rows);
    });
}

}  // namespace elbowroom

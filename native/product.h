// Products of weights with the activations of a pass, on all threads of the pool.
//
// Activations are float32. Few tokens (in_rows) lie in rows [N, width]; more lie in panels of 16 tokens,
// [ceil(N / 16)][width][16], the lanes behind the last token being unused.
#pragma once

#include <initializer_list>

#include "kernels.h"
#include "types.h"

namespace elbowroom {

// A pass in rows reads weights once and computes what it must; panels compute for whole panels, but fastest. Measured:
// 16 tokens 82 against 95 ms, 17 87 against 139, 31 130 against 155, 32 155 against 151, 40 191 against 202.
inline bool in_rows(int64_t num_tokens) {
    return num_tokens <= kPanelTokens || (num_tokens < 3 * kPanelTokens && num_tokens % kPanelTokens != 0);
}

struct Product {
    const Matrix& matrix;
    float* y;
    int64_t stride;  // width of the output that y is a part of
};

// y = W x + bias for every product, or y += W x + bias. The matrices have one dtype.
void multiply(std::initializer_list<Product> products, const float* x, int64_t num_tokens, bool add);

// Few tokens as the kernel `dot` takes them, valid until this thread's next call.
const float* arranged(const Matrix& matrix, const float* x, int64_t num_tokens);

// Rows of weights that one work item takes.
int64_t rows_per_item(const Matrix& matrix, bool few_tokens);

// The same from rows to rows for any number of tokens: y [num_tokens, rows] = x [num_tokens, cols] W^T + bias.
void multiply_rows(const Matrix& matrix, const float* x, int64_t num_tokens, float* y);

}  // namespace elbowroom

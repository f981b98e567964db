// Products of weights with the activations of a pass, on all threads of the pool.
//
// Activations are float32. Up to kFewTokens tokens lie in rows [N, width]; more lie in panels of 16 tokens,
// [ceil(N / 16)][width][16], the lanes behind the last token being unused.
#pragma once

#include <initializer_list>

#include "kernels.h"
#include "types.h"

namespace elbowroom {

inline constexpr int64_t kFewTokens = 16;

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

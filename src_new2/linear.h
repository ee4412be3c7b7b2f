// x W^T + b in float32, for tokens in blocks that are so small that they stay in the caches.
#pragma once

#include "parallel.h"

namespace erniem_fast {

// One of several products with the same x.
struct Product {
  const float* weight;  // (out_features, in_features)
  const float* bias;    // (out_features,) or null
  float* out;           // (tokens, out_features), its rows `out_stride` apart
  int64_t out_features, out_stride;
};

// Computes products of x, (tokens, in_features).
void multiply_tokens(const float* x, int64_t tokens, int64_t in_features, const Product* products, int count,
                     ParallelFor run);

}  // namespace erniem_fast

// The ops inside a layer, as a whole layer in one call runs them: in float32, without dropout, on tokens in blocks.
#pragma once

#include "boundary.h"
#include "ops.h"

namespace erniem_fast {

// Attention of all tokens. `op` is the whole layer's arguments.
template <typename Op>
void attend(const Op& op, const float* qkv, float* out, ParallelFor run) {
  Attention attention = {};
  attention.qkv = qkv;
  attention.longest_first = op.longest_first;
  attention.cu_seqlens = op.cu_seqlens;
  attention.key_mask = op.key_mask;
  attention.out = out;
  attention.tokens = op.tokens;
  attention.sequences = op.sequences;
  attention.hidden = op.projected;
  attention.heads = op.heads;
  attention.threads = op.threads;
  attention.scale = op.scale;
  throw_if(attention_forward(&attention, FLOAT32, run));
}

struct LayerNorm {
  const float *weight, *bias;  // (hidden,)
  double eps;
};

inline void add_norm(const float* residual, const float* x, const LayerNorm& norm, int64_t tokens, int64_t hidden,
                     float* out, ParallelFor run) {
  AddNormForward op = {};
  op.residual = residual;
  op.x = x;
  op.weight = norm.weight;
  op.norm_bias = norm.bias;
  op.out = out;
  op.tokens = tokens;
  op.hidden = hidden;
  op.eps = norm.eps;
  throw_if(add_norm_forward(&op, FLOAT32, run));
}

inline void activate(float* x, int64_t tokens, int64_t features, int64_t activation, ParallelFor run) {
  BiasGeluForward op = {};
  op.x = op.out = x;
  op.tokens = tokens;
  op.features = features;
  op.activation = activation;
  throw_if(bias_gelu_forward(&op, FLOAT32, run));
}

}  // namespace erniem_fast

// Layers that follow each other in one call, and the ops inside them: in float32, without dropout.
#pragma once

#include <algorithm>
#include <memory>

#include "boundary.h"
#include "ops.h"

namespace erniem_fast {

struct LayersForward {
  const float* x;                // (tokens, hidden)
  const int64_t* layers;         // (count,), the addresses of the layers' parameters
  const int64_t* longest_first;  // (sequences,)
  const int32_t* cu_seqlens;     // (sequences + 1,)
  const float* key_bias;         // (tokens,) or null
  const int32_t* key_ranges;     // (tokens, 2) or null
  float* out;                    // (tokens, hidden)
  int64_t tokens, hidden, count, sequences, threads;
};

// Runs the layers in turn; from the second on, `x` is `out`. The scratch has `scratch_features(layer)` numbers for each
// token.
template <typename Layer>
void run_layers(const LayersForward& op, int64_t (*scratch_features)(const Layer&),
                void (*run_layer)(const LayersForward& op, const Layer& layer, const float* x, float* out,
                                  float* scratch, ParallelFor run),
                ParallelFor run) {
  const auto layer = [&](int64_t i) -> const Layer& { return *reinterpret_cast<const Layer*>(op.layers[i]); };
  int64_t features = 0;
  for (int64_t i = 0; i < op.count; ++i) features = std::max(features, scratch_features(layer(i)));
  const std::unique_ptr<float[]> scratch(new float[op.tokens * features]);
  for (int64_t i = 0; i < op.count; ++i) {
    run_layer(op, layer(i), i == 0 ? op.x : op.out, op.out, scratch.get(), run);
  }
}

// Attention of all tokens; `dtype` is that of `qkv` and of `out`.
template <typename Layer>
void attend(const LayersForward& op, const Layer& layer, const void* qkv, void* out, int dtype, ParallelFor run) {
  Attention attention = {};
  attention.qkv = qkv;
  attention.longest_first = op.longest_first;
  attention.cu_seqlens = op.cu_seqlens;
  attention.key_bias = op.key_bias;
  attention.key_ranges = op.key_ranges;
  attention.out = out;
  attention.tokens = op.tokens;
  attention.sequences = op.sequences;
  attention.hidden = layer.projected;
  attention.heads = layer.heads;
  attention.threads = op.threads;
  attention.scale = layer.scale;
  throw_if(attention_forward(&attention, dtype, run));
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

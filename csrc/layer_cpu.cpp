// Whole layers in one call, for so few tokens that returning to Python between ops would take as long as some ops.
#include "layer.h"
#include "linear.h"

namespace erniem_fast {

struct Layer {
  // Weights of linears are (out_features, in_features), biases (out_features,), parameters of layer norms (hidden,).
  const float *q_weight, *q_bias, *k_weight, *k_bias, *v_weight, *v_bias, *out_weight, *out_bias;
  const float *up_weight, *up_bias, *down_weight, *down_bias;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  int64_t hidden, projected, intermediate, heads, activation;
  double norm1_eps, norm2_eps, scale;
};

namespace {

int64_t scratch_features(const Layer& layer) { return 4 * layer.projected + 2 * layer.hidden + layer.intermediate; }

void project(const float* x, int64_t tokens, int64_t in_features, const float* weight, const float* bias, float* out,
             int64_t out_features, ParallelFor run) {
  const Product product = {weight, bias, out, out_features, out_features};
  multiply_tokens(x, tokens, in_features, &product, 1, run);
}

void run_layer(const LayersForward& op, const Layer& layer, const float* residual, float* out, float* scratch,
               ParallelFor run) {
  const int64_t tokens = op.tokens, projected = layer.projected, hidden = layer.hidden, inner = layer.intermediate;
  float *qkv = scratch, *context = qkv + tokens * 3 * projected, *x = context + tokens * projected;
  float *attended = x + tokens * hidden, *activations = attended + tokens * hidden;
  const LayerNorm norm1 = {layer.norm1_weight, layer.norm1_bias, layer.norm1_eps};
  const LayerNorm norm2 = {layer.norm2_weight, layer.norm2_bias, layer.norm2_eps};
  const Product projections[] = {{layer.q_weight, layer.q_bias, qkv, projected, 3 * projected},
                                 {layer.k_weight, layer.k_bias, qkv + projected, projected, 3 * projected},
                                 {layer.v_weight, layer.v_bias, qkv + 2 * projected, projected, 3 * projected}};

  multiply_tokens(residual, tokens, hidden, projections, 3, run);
  attend(op, layer, qkv, context, FLOAT32, run);
  project(context, tokens, projected, layer.out_weight, layer.out_bias, x, hidden, run);
  add_norm(residual, x, norm1, tokens, hidden, attended, run);
  project(attended, tokens, hidden, layer.up_weight, layer.up_bias, activations, inner, run);
  activate(activations, tokens, inner, layer.activation, run);
  project(activations, tokens, inner, layer.down_weight, layer.down_bias, x, hidden, run);
  add_norm(attended, x, norm2, tokens, hidden, out, run);
}

}  // namespace

extern "C" const char* layers_forward(const LayersForward* op, int, ParallelFor run) {
  return error_of([&] { run_layers(*op, scratch_features, run_layer, run); });
}

}  // namespace erniem_fast

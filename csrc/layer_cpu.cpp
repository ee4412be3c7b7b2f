// A whole layer in one call, for so few tokens that returning to Python between its ops would take as long as some ops.
#include "layer.h"
#include "linear.h"

namespace erniem_fast {

struct LayerForward {
  const float* x;  // (tokens, hidden)
  // Weights of linears are (out_features, in_features), biases (out_features,), parameters of layer norms (hidden,).
  const float *q_weight, *q_bias, *k_weight, *k_bias, *v_weight, *v_bias, *out_weight, *out_bias;
  const float *norm1_weight, *norm1_bias, *up_weight, *up_bias, *down_weight, *down_bias, *norm2_weight, *norm2_bias;
  const int64_t* longest_first;  // (sequences,)
  const int32_t* cu_seqlens;     // (sequences + 1,)
  const bool* key_mask;          // (tokens,) or null
  float* scratch;                // (tokens, 4 * projected + 2 * hidden + intermediate)
  float* out;                    // (tokens, hidden)
  int64_t tokens, hidden, projected, intermediate, sequences, heads, threads, activation;
  double norm1_eps, norm2_eps, scale;
};

namespace {

void project(const LayerForward& op, const float* x, int64_t in_features, const float* weight, const float* bias,
             float* out, int64_t out_features, ParallelFor run) {
  const Product product = {weight, bias, out, out_features, out_features};
  multiply_tokens(x, op.tokens, in_features, &product, 1, run);
}

void run_layer(const LayerForward& op, ParallelFor run) {
  const int64_t width = 3 * op.projected, hidden = op.hidden, inner = op.intermediate;
  float *qkv = op.scratch, *context = qkv + op.tokens * width, *x = context + op.tokens * op.projected;
  float *attended = x + op.tokens * hidden, *activations = attended + op.tokens * hidden;
  const LayerNorm norm1 = {op.norm1_weight, op.norm1_bias, op.norm1_eps};
  const LayerNorm norm2 = {op.norm2_weight, op.norm2_bias, op.norm2_eps};
  const Product projections[] = {{op.q_weight, op.q_bias, qkv, op.projected, width},
                                 {op.k_weight, op.k_bias, qkv + op.projected, op.projected, width},
                                 {op.v_weight, op.v_bias, qkv + 2 * op.projected, op.projected, width}};

  multiply_tokens(op.x, op.tokens, hidden, projections, 3, run);
  attend(op, qkv, context, run);
  project(op, context, op.projected, op.out_weight, op.out_bias, x, hidden, run);
  add_norm(op.x, x, norm1, op.tokens, hidden, attended, run);
  project(op, attended, hidden, op.up_weight, op.up_bias, activations, inner, run);
  activate(activations, op.tokens, inner, op.activation, run);
  project(op, activations, inner, op.down_weight, op.down_bias, x, hidden, run);
  add_norm(attended, x, norm2, op.tokens, hidden, op.out, run);
}

}  // namespace

extern "C" const char* layer_forward(const LayerForward* op, int, ParallelFor run) {
  return error_of([&] { run_layer(*op, run); });
}

}  // namespace erniem_fast

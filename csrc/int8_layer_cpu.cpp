// A whole layer in one call, with products of 8-bit integers. A block of tokens goes through all that follows attention
// at once, while its intermediate results are in a core's cache.
#include "int8.h"
#include "layer.h"

namespace erniem_fast {

struct Int8LayerForward {
  const float* x;  // (tokens, hidden)
  // Packed weights and their scales as in `Int8Product`; biases (out_features,) or null; layer norms (hidden,).
  const uint8_t* q_packed;
  const float *q_scale, *q_bias;
  const uint8_t* k_packed;
  const float *k_scale, *k_bias;
  const uint8_t* v_packed;
  const float *v_scale, *v_bias;
  const uint8_t* out_packed;
  const float *out_scale, *out_bias;
  const uint8_t* up_packed;
  const float *up_scale, *up_bias;
  const uint8_t* down_packed;
  const float *down_scale, *down_bias;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  const int64_t* longest_first;  // (sequences,)
  const int32_t* cu_seqlens;     // (sequences + 1,)
  const bool* key_mask;          // (tokens,) or null
  float* scratch;                // (tokens, 4 * projected)
  float* out;                    // (tokens, hidden)
  int64_t tokens, hidden, projected, intermediate, sequences, heads, threads, activation, kernel;
  double norm1_eps, norm2_eps, scale;
};

namespace {

// Queries, keys and values of tokens [first, first + count), side by side.
void project(const Int8LayerForward& op, int64_t first, int64_t count, float* qkv, ParallelFor run) {
  const int64_t width = 3 * op.projected;
  float* out = qkv + first * width;
  const Int8Product products[] = {{op.q_packed, op.q_scale, op.q_bias, out, op.projected, width},
                                  {op.k_packed, op.k_scale, op.k_bias, out + op.projected, op.projected, width},
                                  {op.v_packed, op.v_scale, op.v_bias, out + 2 * op.projected, op.projected, width}};
  Int8Tokens tokens(op.kernel, count, op.hidden);
  tokens.quantise(op.x + first * op.hidden, count, op.hidden, run);
  tokens.multiply(products, 3, run);
}

// From the results of attention, (tokens, projected), to those of the layer, for tokens [first, first + count).
void finish(const Int8LayerForward& op, int64_t first, int64_t count, const float* context, ParallelFor run) {
  const int64_t hidden = op.hidden, inner = op.intermediate;
  const LayerNorm norm1 = {op.norm1_weight, op.norm1_bias, op.norm1_eps};
  const LayerNorm norm2 = {op.norm2_weight, op.norm2_bias, op.norm2_eps};
  const std::unique_ptr<float[]> memory(new float[count * (2 * hidden + inner)]);
  float *x = memory.get(), *attended = x + count * hidden, *activations = attended + count * hidden;
  Int8Tokens tokens(op.kernel, count, std::max({op.projected, hidden, inner}));
  const auto multiply = [&](const float* from, int64_t in_features, const Int8Product& product) {
    tokens.quantise(from, count, in_features, run);
    tokens.multiply(&product, 1, run);
  };

  multiply(context + first * op.projected, op.projected, {op.out_packed, op.out_scale, op.out_bias, x, hidden, hidden});
  add_norm(op.x + first * hidden, x, norm1, count, hidden, attended, run);
  multiply(attended, hidden, {op.up_packed, op.up_scale, op.up_bias, activations, inner, inner});
  activate(activations, count, inner, op.activation, run);
  multiply(activations, inner, {op.down_packed, op.down_scale, op.down_bias, x, hidden, hidden});
  add_norm(attended, x, norm2, count, hidden, op.out + first * hidden, run);
}

void run_layer(const Int8LayerForward& op, ParallelFor run) {
  float *qkv = op.scratch, *context = qkv + op.tokens * 3 * op.projected;
  for_token_blocks(op.tokens, op.threads, run,
                   [&](int64_t first, int64_t count) { project(op, first, count, qkv, run); });
  attend(op, qkv, context, run);
  for_token_blocks(op.tokens, op.threads, run,
                   [&](int64_t first, int64_t count) { finish(op, first, count, context, run); });
}

}  // namespace

extern "C" const char* int8_layer_forward(const Int8LayerForward* op, int, ParallelFor run) {
  return error_of([&] { run_layer(*op, run); });
}

}  // namespace erniem_fast

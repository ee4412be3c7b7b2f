// Whole layers in one call, with packed weights. A block of tokens goes through all that follows attention
// at once, while its intermediate results are in a core's cache.
#include "layer.h"
#include "packed.h"

namespace erniem_fast {

struct PackedLayer {
  // Weights and scales as in `PackedProduct`; biases (out_features,) or null; parameters of layer norms (hidden,).
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
  int64_t hidden, projected, intermediate, heads, activation, kernel;
  int64_t attention_dtype;  // FLOAT32 or BFLOAT16
  double norm1_eps, norm2_eps, scale;
};

namespace {

int64_t scratch_features(const PackedLayer& layer) { return 4 * layer.projected; }

// Queries, keys and values of tokens, side by side.
void project(const PackedLayer& layer, const float* x, int64_t count, float* qkv, ParallelFor run) {
  const int64_t projected = layer.projected, width = 3 * projected;
  const PackedProduct products[] = {
      {layer.q_packed, layer.q_scale, layer.q_bias, qkv, projected, width},
      {layer.k_packed, layer.k_scale, layer.k_bias, qkv + projected, projected, width},
      {layer.v_packed, layer.v_scale, layer.v_bias, qkv + 2 * projected, projected, width}};
  PackedTokens tokens(layer.kernel, count, layer.hidden);
  tokens.round(x, count, layer.hidden, run);
  tokens.multiply(products, 3, run);
}

// From the results of attention, (count, projected), to those of the layer, (count, hidden), which may be `residual`.
void finish(const PackedLayer& layer, const float* context, const float* residual, int64_t count, float* out,
            ParallelFor run) {
  const int64_t hidden = layer.hidden, inner = layer.intermediate;
  const LayerNorm norm1 = {layer.norm1_weight, layer.norm1_bias, layer.norm1_eps};
  const LayerNorm norm2 = {layer.norm2_weight, layer.norm2_bias, layer.norm2_eps};
  const std::unique_ptr<float[]> memory(new float[count * (2 * hidden + inner)]);
  float *x = memory.get(), *attended = x + count * hidden, *activations = attended + count * hidden;
  PackedTokens tokens(layer.kernel, count, std::max({layer.projected, hidden, inner}));
  const auto multiply = [&](const float* from, int64_t in_features, const PackedProduct& product) {
    tokens.round(from, count, in_features, run);
    tokens.multiply(&product, 1, run);
  };

  multiply(context, layer.projected, {layer.out_packed, layer.out_scale, layer.out_bias, x, hidden, hidden});
  add_norm(residual, x, norm1, count, hidden, attended, run);
  multiply(attended, hidden, {layer.up_packed, layer.up_scale, layer.up_bias, activations, inner, inner});
  activate(activations, count, inner, layer.activation, run);
  multiply(activations, inner, {layer.down_packed, layer.down_scale, layer.down_bias, x, hidden, hidden});
  add_norm(attended, x, norm2, count, hidden, out, run);
}

// The conversions that attention in bfloat16 needs, while the numbers are in a core's cache.
template <typename From, typename To>
void convert(const From* from, int64_t size, To* to, ParallelFor run) {
  parallel(run, size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) from_float(to_float(from[i]), to[i]);
  });
}

void project(const PackedLayer& layer, const float* x, int64_t count, BFloat16* qkv, ParallelFor run) {
  const int64_t size = count * 3 * layer.projected;
  const std::unique_ptr<float[]> wide(new float[size]);
  project(layer, x, count, wide.get(), run);
  convert(wide.get(), size, qkv, run);
}

void finish(const PackedLayer& layer, const BFloat16* context, const float* residual, int64_t count, float* out,
            ParallelFor run) {
  const int64_t size = count * layer.projected;
  const std::unique_ptr<float[]> wide(new float[size]);
  convert(context, size, wide.get(), run);
  finish(layer, wide.get(), residual, count, out, run);
}

// A layer with `Element`s, of the dtype, between the products and attention.
template <typename Element>
void run_with(Dtype dtype, const LayersForward& op, const PackedLayer& layer, const float* x, float* out,
              float* scratch, ParallelFor run) {
  const int64_t hidden = layer.hidden, projected = layer.projected;
  Element *qkv = reinterpret_cast<Element*>(scratch), *context = qkv + op.tokens * 3 * projected;
  for_token_blocks(op.tokens, layer.kernel, op.threads, run, [&](int64_t first, int64_t count) {
    project(layer, x + first * hidden, count, qkv + first * 3 * projected, run);
  });
  attend(op, layer, qkv, context, dtype, run);
  for_token_blocks(op.tokens, layer.kernel, op.threads, run, [&](int64_t first, int64_t count) {
    finish(layer, context + first * projected, x + first * hidden, count, out + first * hidden, run);
  });
}

void run_layer(const LayersForward& op, const PackedLayer& layer, const float* x, float* out, float* scratch,
               ParallelFor run) {
  if (layer.attention_dtype == BFLOAT16) {
    run_with<BFloat16>(BFLOAT16, op, layer, x, out, scratch, run);
  } else {
    run_with<float>(FLOAT32, op, layer, x, out, scratch, run);
  }
}

}  // namespace

extern "C" const char* packed_layers_forward(const LayersForward* op, int, ParallelFor run) {
  return error_of([&] { run_layers(*op, scratch_features, run_layer, run); });
}

}  // namespace erniem_fast

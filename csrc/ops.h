// The forwards of the ops inside a layer, which Python calls, and a whole layer too. Their arguments are addresses of
// contiguous tensors, then sizes, then factors; the tables of erniem_fast/native/ have the same fields in the same
// order. "Elements" have the dtype of the call. Each function returns null, or an error message.
#pragma once

#include "elements.h"
#include "parallel.h"

namespace erniem_fast {

// Both directions of attention: the forward, without `grad`, writes `out`; the backward writes `grad_qkv`.
struct Attention {
  const void* qkv;  // (tokens, 3 * hidden) elements: all queries, then all keys, then all values of a token
  const int64_t* longest_first;  // (sequences,)
  const int32_t* cu_seqlens;     // (sequences + 1,)
  const float* key_bias;         // (tokens,) or null
  const int32_t* key_ranges;     // (tokens, 2) or null
  const int64_t* columns;        // (tokens,) or null
  const int64_t* seed;           // (1,) or null
  const void* grad;              // (tokens, hidden) elements, or null in the forward
  void* out;                     // (tokens, hidden) elements, or null in the backward
  void* grad_qkv;                // (tokens, 3 * hidden) elements, or null in the forward
  int64_t tokens, sequences, hidden, heads, threads, threshold;
  double scale, rescale;
};

extern "C" const char* attention_forward(const Attention* op, int dtype, ParallelFor run);

struct AddNormForward {
  const void* residual;         // (tokens, hidden) elements
  const void* x;                // (tokens, hidden) elements
  const float* bias;            // (hidden,) or null
  const float* weight;          // (hidden,)
  const float* norm_bias;       // (hidden,)
  const int64_t* columns;       // (tokens,) or null
  const int64_t* sequence_ids;  // (tokens,) or null
  const int64_t* seed;          // (1,) or null
  void* out;                    // (tokens, hidden) elements
  void* z;                      // (tokens, hidden) elements, the layer norm's input for the backward, or null
  int64_t tokens, hidden, threshold;
  double eps, rescale;
};

extern "C" const char* add_norm_forward(const AddNormForward* op, int dtype, ParallelFor run);

enum Activation { GELU, GELU_TANH, RELU };

struct BiasGeluForward {
  const void* x;                // (tokens, features) elements
  const float* bias;            // (features,) or null
  const int64_t* columns;       // (tokens,) or null
  const int64_t* sequence_ids;  // (tokens,) or null
  const int64_t* seed;          // (1,) or null
  void* out;                    // (tokens, features) elements
  int64_t tokens, features, activation, threshold;
  double rescale;
};

extern "C" const char* bias_gelu_forward(const BiasGeluForward* op, int dtype, ParallelFor run);

}  // namespace erniem_fast

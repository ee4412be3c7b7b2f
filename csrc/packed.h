// x W^T + b by products of 8-bit integers, of bfloat16 or of float32: tokens are rounded here, weights are packed by
// erniem_fast/native/packed.py.
#pragma once

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "quantise.h"

namespace erniem_fast {

// One of several products with the same tokens.
struct PackedProduct {
  const uint8_t* packed;  // for each block of columns its numbers; of integers then the sums of its columns
  const float* scale;     // (out_features,) of integers, else null
  const float* bias;      // (out_features,) or null
  float* out;             // (tokens, out_features), its rows `out_stride` apart
  int64_t out_features, out_stride;
};

// Tokens in the format of a kernel, each rounded by itself.
struct PackedTokens {
  // Has memory for so many tokens and features. Throws an error if this library or processor lacks the kernel.
  PackedTokens(int64_t kernel, int64_t most_tokens, int64_t most_features);

  // Takes the rows of x, (tokens, features), which has to stay where it is until they are multiplied.
  void round(const float* x, int64_t tokens, int64_t features, ParallelFor run);

  // Computes products of the tokens that were rounded last.
  void multiply(const PackedProduct* products, int count, ParallelFor run) const;

  int64_t kernel, tokens = 0, stride = 0;
  int levels;                          // as a kernel's
  const uint8_t* rows = nullptr;       // (tokens, stride): whole groups; the weight has zeros for what is beyond a row
  std::unique_ptr<uint8_t[]> rounded;  // memory for the rows; null for float32, which is read where it is
  std::unique_ptr<Rounding[]> roundings;  // (tokens,) of integers
};

// A kernel's product of at most `most_rows` rows with one block of a weight; see `multiply_rows` in packed_cpu.cpp.
struct FloatTile {
  void (*multiply)(int64_t rows, const uint8_t* x, int64_t stride, const uint8_t* block, const uint8_t* next,
                   int64_t groups, float* sums) = nullptr;
  int64_t most_rows = 0;
};

// The best kernel of bfloat16; null if this library or processor has none.
FloatTile bfloat16_tile();

constexpr int64_t FEW_PER_THREAD = 32;

// The tokens of a block, whose intermediate results stay in a core's cache.
int64_t tokens_per_block(int64_t kernel);

// Calls `body(first, count)` for blocks of tokens, each on one thread; or once for all of few tokens, so that threads
// share each of its steps, and each weight is read once.
template <typename Body>
void for_token_blocks(int64_t tokens, int64_t kernel, int64_t threads, ParallelFor run, const Body& body) {
  if (tokens <= FEW_PER_THREAD * threads) return body(0, tokens);
  const int64_t most = tokens_per_block(kernel);
  parallel(run, tokens, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += most) body(first, std::min(most, end - first));
  });
}

}  // namespace erniem_fast

// x W^T + b by products of 8-bit integers: tokens are quantised here, weights are packed by erniem_fast/native/int8.py.
#pragma once

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "quantise.h"

namespace erniem_fast {

// One of several products with the same tokens.
struct Int8Product {
  const uint8_t* packed;  // for each block of columns: its integers, then the sums of its columns
  const float* scale;     // (out_features,)
  const float* bias;      // (out_features,) or null
  float* out;             // (tokens, out_features), its rows `out_stride` apart
  int64_t out_features, out_stride;
};

// Tokens as integers, each rounded by itself.
struct Int8Tokens {
  // Has memory for so many tokens and features. Throws an error if this library or processor lacks the kernel.
  Int8Tokens(int64_t kernel, int64_t most_tokens, int64_t most_features);

  // Takes the rows of x, (tokens, features).
  void quantise(const float* x, int64_t tokens, int64_t features, ParallelFor run);

  // Computes products of the tokens that were quantised last.
  void multiply(const Int8Product* products, int count, ParallelFor run) const;

  int64_t kernel, tokens = 0, stride = 0;
  int levels;
  std::unique_ptr<uint8_t[]> rows;  // (tokens, stride): whole groups; the weight has zeros for what is beyond a row
  std::unique_ptr<Rounding[]> roundings;  // (tokens,)
};

constexpr int64_t TOKENS_PER_BLOCK = 48;  // a block's intermediate results stay in a core's cache
constexpr int64_t FEW_PER_THREAD = 32;

// Calls `body(first, count)` for blocks of tokens, each on one thread; or once for all of few tokens, so that threads
// share each of its steps, and each weight is read once.
template <typename Body>
void for_token_blocks(int64_t tokens, int64_t threads, ParallelFor run, const Body& body) {
  if (tokens <= FEW_PER_THREAD * threads) return body(0, tokens);
  constexpr int64_t UNIT = 12;  // whole tiles of the widest kernel
  parallel(run, (tokens + UNIT - 1) / UNIT, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * UNIT, tokens);
    for (int64_t first = begin * UNIT; first < last; first += TOKENS_PER_BLOCK) {
      body(first, std::min(TOKENS_PER_BLOCK, last - first));
    }
  });
}

}  // namespace erniem_fast

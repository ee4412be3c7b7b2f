// x W^T + b for so few tokens that reading the weight takes longer than multiplying with it.
//
// The weight streams through the caches once, as it lies in memory; x, transposed, stays in them. While a tile is
// multiplied, the next one is fetched: the processor's own prefetching starts anew at every row and page.
#include <memory>

#include "parallel.h"
#include "product.h"

struct FewTokens {
  const float* x;       // (tokens, in_features)
  const float* weight;  // (out_features, in_features)
  const float* bias;    // (out_features,) or null
  float* out;           // (tokens, out_features), its rows `out_stride` apart
  int64_t tokens, in_features, out_features, out_stride;
};

namespace {

constexpr int64_t LINE = 64 / sizeof(float);  // elements of a line of the cache

// x^T of up to LANES tokens, zeros beyond them; by blocks of features, so that a block's lines stay in the cache.
template <int LANES>
void transpose(const float* x, int64_t tokens, int64_t features, float* transposed) {
  for (int64_t begin = 0; begin < features; begin += LINE) {
    const int64_t end = begin + LINE < features ? begin + LINE : features;
    for (int64_t token = 0; token < LANES; ++token) {
      for (int64_t k = begin; k < end; ++k) transposed[k * LANES + token] = token < tokens ? x[token * features + k] : 0.0f;
    }
  }
}

// Columns [begin, end) of the result.
template <int VECTORS>
void multiply_columns(const FewTokens& op, const float* transposed, int64_t begin, int64_t end) {
  constexpr int ROWS = TILE_ROWS<VECTORS>, LANES = VECTORS * WIDTH;
  float tile[ROWS * LANES];
  for (int64_t column = begin; column < end; column += ROWS) {
    const int rows = column + ROWS > op.out_features ? int(op.out_features - column) : ROWS;
    const float* weight = op.weight + column * op.in_features;
    if (rows == ROWS) {
      const float* next = weight + ROWS * op.in_features;
      // ROWS lines for every LINE steps, which is how fast a tile's rows are consumed.
      const auto fetch = [&](int64_t k) {
        if (k % LINE < ROWS) __builtin_prefetch(next + (k / LINE * ROWS + k % LINE) * LINE, 0, 2);
      };
      multiply_tile<ROWS, VECTORS>(weight, op.in_features, transposed, LANES, tile, LANES, op.in_features, fetch);
    } else {
      for (int i = 0; i < rows; ++i) {
        const float* row = weight + i * op.in_features;
        multiply_tile<1, VECTORS>(row, 0, transposed, LANES, tile + i * LANES, LANES, op.in_features, [](int64_t) {});
      }
    }
    for (int64_t token = 0; token < op.tokens; ++token) {
      float* out = op.out + token * op.out_stride + column;
      for (int i = 0; i < rows; ++i) out[i] = tile[i * LANES + token] + (op.bias == nullptr ? 0.0f : op.bias[column + i]);
    }
  }
}

template <int VECTORS>
const char* multiply(const FewTokens& op, ParallelFor run) {
  constexpr int ROWS = TILE_ROWS<VECTORS>, LANES = VECTORS * WIDTH;
  const std::unique_ptr<float[]> transposed(new float[op.in_features * LANES]);
  transpose<LANES>(op.x, op.tokens, op.in_features, transposed.get());
  const int64_t tiles = (op.out_features + ROWS - 1) / ROWS;
  return parallel(run, tiles, ROWS * op.in_features, [&](int64_t begin, int64_t end) {
    multiply_columns<VECTORS>(op, transposed.get(), begin * ROWS, end * ROWS < op.out_features ? end * ROWS : op.out_features);
  });
}

const char* multiply(const FewTokens& op, ParallelFor run) {
  if (op.tokens <= WIDTH) return multiply<1>(op, run);
  if (op.tokens <= 2 * WIDTH) return multiply<2>(op, run);
  if (op.tokens <= 3 * WIDTH) return multiply<3>(op, run);
  return multiply<4>(op, run);
}

}  // namespace

extern "C" const char* few_tokens(const FewTokens* op, int, ParallelFor run) {
  constexpr int64_t MOST = 4 * WIDTH;
  const char* error = nullptr;
  for (int64_t begin = 0; begin < op->tokens && error == nullptr; begin += MOST) {
    FewTokens part = *op;
    part.x += begin * op->in_features;
    part.out += begin * op->out_stride;
    part.tokens = op->tokens - begin < MOST ? op->tokens - begin : MOST;
    error = multiply(part, run);
  }
  return error;
}

// The weight streams through the caches once, as it lies in memory; x, transposed, stays in them.
#include "few_tokens.h"

#include <memory>

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
constexpr int64_t PAGE = 4096 / sizeof(float);

struct Operand {
  const float* transposed;  // (in_features, LANES)
  int64_t first, tokens;    // which rows of x and of the results
  int64_t in_features;
};

// Column `column` and the following of the result, as many as a tile has rows.
template <int VECTORS>
void multiply_tile_of(const Operand& x, const Product& product, int64_t column) {
  constexpr int ROWS = TILE_ROWS<VECTORS>, LANES = VECTORS * WIDTH;
  float tile[ROWS * LANES];
  const int64_t depth = x.in_features;
  const int rows = int(std::min<int64_t>(ROWS, product.out_features - column));
  const float* weight = product.weight + column * depth;
  const auto nothing = [](int64_t) {};
  if (rows < ROWS) {
    for (int i = 0; i < rows; ++i) {
      multiply_tile<1, VECTORS>(weight + i * depth, 0, x.transposed, LANES, tile + i * LANES, LANES, depth, nothing);
    }
  } else if (depth >= PAGE) {
    multiply_tile<ROWS, VECTORS>(weight, depth, x.transposed, LANES, tile, LANES, depth, nothing);
  } else {
    // Rows of less than a page are too short for the processor's own prefetching, which starts anew at each of them. So
    // the next tile is fetched meanwhile: ROWS lines for every LINE steps, which is how fast a tile is consumed.
    const float* next = weight + ROWS * depth;
    const auto fetch = [&](int64_t k) {
      if (k % LINE < ROWS) __builtin_prefetch(next + (k / LINE * ROWS + k % LINE) * LINE, 0, 2);
    };
    multiply_tile<ROWS, VECTORS>(weight, depth, x.transposed, LANES, tile, LANES, depth, fetch);
  }
  for (int64_t token = 0; token < x.tokens; ++token) {
    float* out = product.out + (x.first + token) * product.out_stride + column;
    for (int i = 0; i < rows; ++i) {
      out[i] = tile[i * LANES + token] + (product.bias == nullptr ? 0.0f : product.bias[column + i]);
    }
  }
}

template <int VECTORS>
const char* multiply(const float* x, Operand operand, const Product* products, int count, ParallelFor run) {
  constexpr int ROWS = TILE_ROWS<VECTORS>, LANES = VECTORS * WIDTH;
  const int64_t depth = operand.in_features;
  const std::unique_ptr<float[]> transposed(new float[depth * LANES]);
  operand.transposed = transposed.get();
  const char* error = parallel(run, round_up(depth, WIDTH) / WIDTH, LANES * WIDTH, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * WIDTH, features = std::min(end * WIDTH, depth) - first;
    transpose(x + operand.first * depth + first, operand.tokens, depth, features, transposed.get() + first * LANES, LANES);
  });
  const auto tiles_of = [](const Product& product) { return round_up(product.out_features, ROWS) / ROWS; };
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += tiles_of(products[i]);
  if (error != nullptr) return error;
  return parallel(run, tiles, ROWS * depth, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // tile of a product
    for (int i = 0; i < count; ++i) {
      const int64_t beyond = first + tiles_of(products[i]);
      for (int64_t tile = std::max(begin, first); tile < std::min(end, beyond); ++tile) {
        multiply_tile_of<VECTORS>(operand, products[i], (tile - first) * ROWS);
      }
      first = beyond;
    }
  });
}

}  // namespace

const char* multiply_few(const float* x, int64_t tokens, int64_t in_features, const Product* products, int count,
                         ParallelFor run) {
  constexpr int64_t MOST = 4 * WIDTH;
  const char* error = nullptr;
  for (int64_t first = 0; first < tokens && error == nullptr; first += MOST) {
    const Operand part = {nullptr, first, std::min(MOST, tokens - first), in_features};
    switch ((part.tokens - 1) / WIDTH) {
      case 0:
        error = multiply<1>(x, part, products, count, run);
        break;
      case 1:
        error = multiply<2>(x, part, products, count, run);
        break;
      case 2:
        error = multiply<3>(x, part, products, count, run);
        break;
      default:
        error = multiply<4>(x, part, products, count, run);
    }
  }
  return error;
}

extern "C" const char* few_tokens(const FewTokens* op, int, ParallelFor run) {
  const Product product = {op->weight, op->bias, op->out, op->out_features, op->out_stride};
  return multiply_few(op->x, op->tokens, op->in_features, &product, 1, run);
}

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

// Columns `column`, `column + stride` and so on of the result, which come from as many rows of the weight.
template <int ROWS, int VECTORS, typename Ahead>
void multiply_rows(const Operand& x, const Product& product, int64_t column, int64_t stride, const Ahead& ahead) {
  constexpr int LANES = VECTORS * WIDTH;
  float tile[ROWS * LANES];
  const int64_t depth = x.in_features;
  const float* weight = product.weight + column * depth;
  multiply_tile<ROWS, VECTORS>(weight, stride * depth, x.transposed, LANES, tile, LANES, depth, ahead);
  for (int64_t token = 0; token < x.tokens; ++token) {
    float* out = product.out + (x.first + token) * product.out_stride;
    for (int i = 0; i < ROWS; ++i) {
      const int64_t to = column + i * stride;
      out[to] = tile[i * LANES + token] + (product.bias == nullptr ? 0.0f : product.bias[to]);
    }
  }
}

// The weight's rows in tiles, and what is left over one by one.
template <int ROWS>
struct Tiles {
  explicit Tiles(const Product& product) : whole(product.out_features / ROWS), rest(product.out_features % ROWS) {}
  int64_t whole, rest;
};

// Rows of a page or more the processor fetches ahead by itself; at shorter ones it would start anew too often.
template <int VECTORS>
void multiply_tile_of(const Operand& x, const Product& product, int64_t tile) {
  constexpr int ROWS = TILE_ROWS<VECTORS>;
  const auto nothing = [](int64_t) {};
  const Tiles<ROWS> tiles(product);
  if (tile >= tiles.whole) {
    multiply_rows<1, VECTORS>(x, product, tiles.whole * ROWS + tile - tiles.whole, 0, nothing);
  } else if (x.in_features >= PAGE) {
    multiply_rows<ROWS, VECTORS>(x, product, tile * ROWS, 1, nothing);
  } else if (VECTORS == 1) {
    // Rows far apart, of which the next tile takes the next ones: so each belongs to a long stream. (Where a result has
    // more lanes, to scatter them costs more than that saves.)
    multiply_rows<ROWS, VECTORS>(x, product, tile, tiles.whole, nothing);
  } else {
    // The next tile is fetched meanwhile: ROWS lines for every LINE steps, which is how fast a tile is consumed.
    const float* next = product.weight + (tile + 1) * ROWS * x.in_features;
    const auto fetch = [&](int64_t k) {
      if (k % LINE < ROWS) __builtin_prefetch(next + (k / LINE * ROWS + k % LINE) * LINE, 0, 2);
    };
    multiply_rows<ROWS, VECTORS>(x, product, tile * ROWS, 1, fetch);
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
  const auto tiles_of = [](const Product& product) { return Tiles<ROWS>(product).whole + Tiles<ROWS>(product).rest; };
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += tiles_of(products[i]);
  if (error != nullptr) return error;
  return parallel(run, tiles, ROWS * depth, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // tile of a product
    for (int i = 0; i < count; ++i) {
      const int64_t beyond = first + tiles_of(products[i]);
      for (int64_t tile = std::max(begin, first); tile < std::min(end, beyond); ++tile) {
        multiply_tile_of<VECTORS>(operand, products[i], tile - first);
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

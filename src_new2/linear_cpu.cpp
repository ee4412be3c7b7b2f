// The product x W^T + b on a CPU, in float32, for blocks of few tokens: each reads the weight once, in the order of its
// memory, and is transposed to stay in the caches.
#include <memory>
#include <vector>

#include "boundary.h"
#include "linear.h"
#include "product.h"
#include "transpose.h"

namespace erniem_fast {

struct LinearForward {
  const float* x;       // (tokens, in_features)
  const float* weight;  // (out_features, in_features)
  const float* bias;    // (out_features,) or null
  float* out;           // (tokens, out_features), its rows `out_stride` apart
  int64_t tokens, in_features, out_features, out_stride;
};

namespace {

constexpr int64_t LINE = 64 / sizeof(float);  // elements of a cache line
constexpr int64_t PAGE = 4096 / sizeof(float);

struct Operand {
  const float* x;           // (tokens, in_features)
  const float* transposed;  // (in_features, LANES), of the first tokens
  int64_t tokens, lanes;    // their number, and how many of them are transposed
  int64_t in_features;
};

void store(const Product& product, int64_t token, int64_t column, float sum) {
  product.out[token * product.out_stride + column] = sum + (product.bias == nullptr ? 0.0f : product.bias[column]);
}

// Columns `column`, `column + stride` and so on of the result for the transposed tokens, from the rows of the weight
// with the same indices.
template <int ROWS, int VECTORS, typename Ahead>
void multiply_lanes(const Operand& x, const Product& product, int64_t column, int64_t stride, const Ahead& ahead) {
  constexpr int LANES = VECTORS * WIDTH;
  float tile[ROWS * LANES];
  const int64_t depth = x.in_features;
  const float* weight = product.weight + column * depth;
  multiply_tile<ROWS, VECTORS>(weight, stride * depth, x.transposed, LANES, tile, LANES, depth, ahead);
  for (int64_t token = 0; token < x.lanes; ++token) {
    for (int i = 0; i < ROWS; ++i) store(product, token, column + i * stride, tile[i * LANES + token]);
  }
}

// The same columns for TOKENS tokens from `token` on, which are not transposed.
template <int ROWS, int TOKENS>
void multiply_others(const Operand& x, const Product& product, int64_t column, int64_t stride, int64_t token) {
  constexpr int PART = ROWS % 4 == 0 ? 4 : ROWS % 3 == 0 ? 3 : ROWS;  // rows whose sums stay in registers
  float sums[TOKENS * PART];
  const int64_t depth = x.in_features;
  for (int part = 0; part < ROWS; part += PART) {
    const float* weight = product.weight + (column + part * stride) * depth;
    multiply_dots<PART, TOKENS>(weight, stride * depth, x.x + token * depth, depth, sums, PART);
    for (int j = 0; j < TOKENS; ++j) {
      for (int i = 0; i < PART; ++i) store(product, token + j, column + (part + i) * stride, sums[j * PART + i]);
    }
  }
}

// The same columns for all tokens: first the transposed ones, then the others, while the rows are in the cache.
template <int ROWS, int VECTORS, typename Ahead>
void multiply_rows(const Operand& x, const Product& product, int64_t column, int64_t stride, const Ahead& ahead) {
  multiply_lanes<ROWS, VECTORS>(x, product, column, stride, ahead);
  int64_t token = x.lanes;
  for (; token + 4 <= x.tokens; token += 4) multiply_others<ROWS, 4>(x, product, column, stride, token);
  for (; token < x.tokens; ++token) multiply_others<ROWS, 1>(x, product, column, stride, token);
}

// The number of whole tiles of the weight's rows, and of the rows left over, which are done one by one.
template <int ROWS>
struct Tiles {
  explicit Tiles(const Product& product) : whole(product.out_features / ROWS), rest(product.out_features % ROWS) {}
  int64_t whole, rest;
};

// The processor prefetches rows of a page or more by itself, but with shorter rows it would have to restart too often.
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
    // A tile takes rows that are far apart, and the next tile takes the next row after each of them: so the processor
    // sees ROWS long streams. (With more than one vector, scattering the results costs more than that saves.)
    multiply_rows<ROWS, VECTORS>(x, product, tile, tiles.whole, nothing);
  } else {
    // Prefetches the next tile: ROWS cache lines for every LINE steps, as fast as a tile is read.
    const float* next = product.weight + (tile + 1) * ROWS * x.in_features;
    const auto fetch = [&](int64_t k) {
      if (k % LINE < ROWS) __builtin_prefetch(next + (k / LINE * ROWS + k % LINE) * LINE, 0, 2);
    };
    multiply_rows<ROWS, VECTORS>(x, product, tile * ROWS, 1, fetch);
  }
}

template <int VECTORS>
void multiply(const Operand& x, const Product* products, int count, ParallelFor run) {
  constexpr int ROWS = TILE_ROWS<VECTORS>, LANES = VECTORS * WIDTH;
  const int64_t depth = x.in_features;
  const std::unique_ptr<float[]> transposed(new float[depth * LANES]);
  const Operand operand = {x.x, transposed.get(), x.tokens, std::min<int64_t>(LANES, x.tokens), depth};
  parallel(run, round_up(depth, WIDTH) / WIDTH, LANES * WIDTH, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * WIDTH, features = std::min(end * WIDTH, depth) - first;
    transpose(x.x + first, operand.lanes, depth, features, transposed.get() + first * LANES, LANES);
  });
  const auto tiles_of = [](const Product& product) { return Tiles<ROWS>(product).whole + Tiles<ROWS>(product).rest; };
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) tiles += tiles_of(products[i]);
  parallel(run, tiles, ROWS * depth, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // index of the product's first tile
    for (int i = 0; i < count; ++i) {
      const int64_t beyond = first + tiles_of(products[i]);
      for (int64_t tile = std::max(begin, first); tile < std::min(end, beyond); ++tile) {
        multiply_tile_of<VECTORS>(operand, products[i], tile - first);
      }
      first = beyond;
    }
  });
}

// A vector that would be three quarters empty costs more than it saves: its tokens are not transposed.
constexpr int64_t MOST = 4 * WIDTH, FEW = WIDTH / 4;

// Up to MOST + FEW tokens.
void multiply_block(const Operand& x, const Product* products, int count, ParallelFor run) {
  switch ((x.tokens + WIDTH - 1 - FEW) / WIDTH) {
    case 0:
    case 1:
      return multiply<1>(x, products, count, run);
    case 2:
      return multiply<2>(x, products, count, run);
    case 3:
      return multiply<3>(x, products, count, run);
    default:
      return multiply<4>(x, products, count, run);
  }
}

}  // namespace

void multiply_tokens(const float* x, int64_t tokens, int64_t in_features, const Product* products, int count,
                     ParallelFor run) {
  std::vector<Product> blocks(products, products + count);
  for (int64_t first = 0, size; first < tokens; first += size) {
    size = tokens - first > MOST + FEW ? MOST : tokens - first;
    for (int i = 0; i < count; ++i) blocks[i].out = products[i].out + first * products[i].out_stride;
    multiply_block({x + first * in_features, nullptr, size, 0, in_features}, blocks.data(), count, run);
  }
}

extern "C" const char* linear_forward(const LinearForward* op, int, ParallelFor run) {
  const Product product = {op->weight, op->bias, op->out, op->out_features, op->out_stride};
  return error_of([&] { multiply_tokens(op->x, op->tokens, op->in_features, &product, 1, run); });
}

}  // namespace erniem_fast

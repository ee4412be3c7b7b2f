// The product x W^T + b on a CPU, with a packed weight. With one of integers it has the bits of `quantised_linear` of
// erniem_fast/reference.py.
#include <algorithm>
#include <stdexcept>

#include "boundary.h"
#include "packed.h"
#include "packed_tile.h"
#include "product.h"
#include "quantise.h"
#include "rows.h"

namespace erniem_fast {

struct PackedLevels {
  int64_t* levels;  // (kernels,), each kernel's LEVELS; 0 if there is no such kernel here
  int64_t kernels;
};

struct PackedLinearForward {
  const float* x;         // (tokens, in_features)
  const uint8_t* packed;  // see `PackedProduct`
  const float* scale;     // (out_features,) or null
  const float* bias;      // (out_features,) or null
  float* out;             // (tokens, out_features), its rows `out_stride` apart
  int64_t tokens, in_features, out_features, out_stride, threads, kernel;
};

namespace {

constexpr int64_t TILES = 4;  // of tokens that a task takes in turn, while its block of the weight is in the cache

int64_t blocks_of(const PackedProduct& product) { return (product.out_features + COLUMNS - 1) / COLUMNS; }

// One block of a packed weight, and the parameters of its columns: zeros for those beyond the last one.
struct Block {
  Block(const PackedProduct& product, int64_t index, int64_t groups)
      : bytes(groups * GROUP * COLUMNS + (product.scale == nullptr ? 0 : sizeof column_sums)),
        weight(product.packed + index * bytes),
        column(index * COLUMNS),
        columns(int(std::min<int64_t>(COLUMNS, product.out_features - column))) {
    if (product.scale != nullptr) {
      memcpy(column_sums, weight + groups * GROUP * COLUMNS, sizeof column_sums);
      memcpy(scale, product.scale + column, columns * sizeof(float));
    }
    for (int i = 0; i < columns; ++i) bias[i] = product.bias == nullptr ? -0.0f : product.bias[column + i];
  }
  const uint8_t* end() const { return weight + bytes; }
  int32_t column_sums[COLUMNS];
  float scale[COLUMNS] = {}, bias[COLUMNS] = {};
  int64_t bytes;
  const uint8_t* weight;
  int64_t column;
  int columns;
};

// The results of WIDTH columns for a token, as floating-point numbers without bias, from their sums.
Vector rescale(const int32_t* sums, const Block& block, int first, const Rounding& token) {
  typedef int32_t Integers __attribute__((vector_size(sizeof(Vector))));
  Integers found, column_sums;
  memcpy(&found, sums + first, sizeof found);
  memcpy(&column_sums, block.column_sums + first, sizeof column_sums);
  const Vector scale = token.scale * load_vector(block.scale + first);
  return __builtin_convertvector(found - token.zero * column_sums, Vector) * scale;
}

Vector rescale(const float* sums, const Block&, int first, const Rounding&) { return load_vector(sums + first); }

// Fetches the memory of a token's results into the cache while the sums are computed; stores would wait for it.
void fetch_to_write(const float* row) {
  for (int i = 0; i < COLUMNS; i += 16) __builtin_prefetch(row + i, 1);
}

// Stores a token's results: of integers sum (scale_x scale_w) + bias, rounded after each operation.
template <typename Sum>
void store_row(const Sum* sums, const Block& block, const Rounding& token, float* row) {
  float part[COLUMNS], *to = block.columns == COLUMNS ? row : part;
  for (int i = 0; i < COLUMNS; i += WIDTH) {
    const Vector result = rounded_now(rescale(sums, block, i, token)) + load_vector(block.bias + i);
    memcpy(to + i, &result, sizeof result);
  }
  if (to == part) memcpy(row, part, block.columns * sizeof(float));
}

// Calls the kernel's function for this number of rows, at most MOST_ROWS.
template <typename Kernel, int... I>
void multiply_rows(int64_t rows, const uint8_t* x, int64_t stride, const uint8_t* weight, const uint8_t* next,
                   int64_t groups, typename Kernel::Sum* sums, std::integer_sequence<int, I...>) {
  using Multiply = void (*)(const uint8_t*, int64_t, const int8_t*, const int8_t*, int64_t, typename Kernel::Sum*);
  static constexpr Multiply by_rows[] = {Kernel::template multiply<I + 1>...};
  by_rows[rows - 1](x, stride, reinterpret_cast<const int8_t*>(weight), reinterpret_cast<const int8_t*>(next), groups,
                    sums);
}

template <typename Kernel>
void multiply_rows(int64_t rows, const uint8_t* x, int64_t stride, const uint8_t* weight, const uint8_t* next,
                   int64_t groups, typename Kernel::Sum* sums) {
  multiply_rows<Kernel>(rows, x, stride, weight, next, groups, sums,
                        std::make_integer_sequence<int, Kernel::MOST_ROWS>());
}

// One of `tiles` tiles of tokens, for a block of a product's columns; the next block at `next` is needed soon.
template <typename Kernel>
void multiply_tile(const PackedTokens& x, const PackedProduct& product, const Block& block, const uint8_t* next,
                   int64_t tile, int64_t tiles) {
  const int64_t first = x.tokens * tile / tiles, size = x.tokens * (tile + 1) / tiles - first;
  const auto row = [&](int64_t i) { return product.out + (first + i) * product.out_stride + block.column; };
  for (int64_t i = 0; i < size; ++i) fetch_to_write(row(i));
  alignas(64) typename Kernel::Sum sums[Kernel::MOST_ROWS * COLUMNS];
  multiply_rows<Kernel>(size, x.rows + first * x.stride, x.stride, block.weight, next, x.stride / GROUP, sums);
  for (int64_t i = 0; i < size; ++i) store_row(sums + i * COLUMNS, block, x.roundings[first + i], row(i));
}

template <typename Kernel>
void multiply_tokens(const PackedTokens& x, const PackedProduct* products, int count, ParallelFor run) {
  const int64_t tiles = (x.tokens + Kernel::MOST_ROWS - 1) / Kernel::MOST_ROWS, shares = (tiles + TILES - 1) / TILES;
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += blocks_of(products[i]);
  const int64_t work = x.stride * COLUMNS / 8 * std::min(x.tokens, TILES * Kernel::MOST_ROWS);
  parallel(run, blocks * shares, work, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t index = task / shares, share = task % shares;
      const PackedProduct* product = products;
      for (; index >= blocks_of(*product); ++product) index -= blocks_of(*product);
      const Block block(*product, index, x.stride / GROUP);
      const int64_t last = tiles * (share + 1) / shares;
      for (int64_t i = tiles * share / shares; i < last; ++i) {
        // The last tile fetches what the next task multiplies by; the others what is in the cache.
        const uint8_t* next = i == last - 1 && share == shares - 1 ? block.end() : block.weight;
        multiply_tile<Kernel>(x, *product, block, next, i, tiles);
      }
    }
  });
}

int levels_of(int64_t kernel) {
  int levels = 0;
  with_packed_kernel(kernel, [&](auto found) { levels = found.LEVELS; });
  return levels;
}

// The bytes of a token's row, in whole groups.
int64_t bytes_of(int64_t features, int levels) {
  if (levels == FLOAT32_LEVELS) return features * sizeof(float);
  return round_up(levels == BFLOAT16_LEVELS ? features * sizeof(BFloat16) : features, GROUP);
}

// Writes `stride` bytes: features in bfloat16, and zeros.
void round_row(const float* x, int64_t features, int64_t stride, uint8_t* to) {
  BFloat16* row = reinterpret_cast<BFloat16*>(to);
  for (int64_t i = 0; i < features; ++i) from_float(x[i], row[i]);
  memset(row + features, 0, stride - features * sizeof(BFloat16));  // zeros of the weight times NaN would be NaN
}

}  // namespace

int64_t tokens_per_block(int64_t kernel) {
  int64_t tokens = 0;
  with_packed_kernel(kernel, [&](auto found) { tokens = found.BLOCK_TOKENS; });
  return tokens;
}

FloatTile bfloat16_tile() {
  FloatTile tile;
  for (const PackedKernel kernel : {AVX512_BF16, AMX_BF16}) {
    with_packed_kernel(kernel, [&](auto found) {
      using Kernel = decltype(found);
      if constexpr (Kernel::LEVELS == BFLOAT16_LEVELS) tile = {multiply_rows<Kernel>, Kernel::MOST_ROWS};
    });
  }
  return tile;
}

PackedTokens::PackedTokens(int64_t kernel, int64_t most_tokens, int64_t most_features)
    : kernel(kernel),
      levels(levels_of(kernel)),
      rounded(levels == FLOAT32_LEVELS ? nullptr : new uint8_t[most_tokens * bytes_of(most_features, levels)]),
      roundings(new Rounding[most_tokens]) {
  if (levels == 0) throw std::invalid_argument("this processor lacks the kernel");
}

void PackedTokens::round(const float* x, int64_t its_tokens, int64_t features, ParallelFor run) {
  tokens = its_tokens, stride = bytes_of(features, levels), rows = rounded.get();
  if (levels == FLOAT32_LEVELS) {
    rows = reinterpret_cast<const uint8_t*>(x);
    return;
  }
  parallel(run, tokens, 2 * features, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* from = x + token * features;
      uint8_t* row = rounded.get() + token * stride;
      if (levels == BFLOAT16_LEVELS) {
        round_row(from, features, stride, row);
      } else {
        roundings[token] = quantise_row(from, features, levels, row);
      }
    }
  });
}

void PackedTokens::multiply(const PackedProduct* products, int count, ParallelFor run) const {
  with_packed_kernel(kernel, [&](auto found) { multiply_tokens<decltype(found)>(*this, products, count, run); });
}

extern "C" const char* packed_levels(const PackedLevels* op, int, ParallelFor) {
  return error_of([&] {
    for (int64_t kernel = 0; kernel < op->kernels; ++kernel) op->levels[kernel] = levels_of(kernel);
  });
}

extern "C" const char* packed_linear_forward(const PackedLinearForward* op, int, ParallelFor run) {
  return error_of([&] {
    for_token_blocks(op->tokens, op->kernel, op->threads, run, [&](int64_t first, int64_t count) {
      PackedTokens tokens(op->kernel, count, op->in_features);
      tokens.round(op->x + first * op->in_features, count, op->in_features, run);
      const PackedProduct product = {op->packed,       op->scale,     op->bias, op->out + first * op->out_stride,
                                     op->out_features, op->out_stride};
      tokens.multiply(&product, 1, run);
    });
  });
}

}  // namespace erniem_fast

// The inner loops of a float32 matrix product on a CPU, for operands in the caches.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace erniem_fast {

inline int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// The largest number of rows of VECTORS vectors whose sums stay in registers: AVX-512 has 32 registers, AVX2 has 16.
template <int VECTORS>
constexpr int TILE_ROWS = WIDTH == 16 ? (VECTORS == 1   ? 8
                                         : VECTORS == 2 ? 12
                                         : VECTORS == 3 ? 8
                                                        : 6)
                                      : (VECTORS == 1   ? 8
                                         : VECTORS == 2 ? 6
                                         : VECTORS == 3 ? 3
                                                        : 2);

// c = a b, where a has ROWS rows and `depth` columns, and b has `depth` rows and VECTORS * WIDTH columns. Calls `ahead`
// once for every step of the depth.
template <int ROWS, int VECTORS, typename Ahead>
inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                          int64_t c_stride, int64_t depth, const Ahead& ahead) {
  Vector sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    ahead(k);
    Vector right[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) right[j] = load_vector(b + k * b_stride + j * WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const float left = a[i * a_stride + k];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) memcpy(c + i * c_stride + j * WIDTH, &sums[i][j], sizeof(Vector));
  }
}

// c[token, i] = the dot product of row i of a and row `token` of b, each `depth` long; for tokens too few to fill
// vectors.
template <int ROWS, int TOKENS>
inline void multiply_dots(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride) {
  Vector sums[TOKENS][ROWS] = {};
  int64_t k = 0;
  for (; k + WIDTH <= depth; k += WIDTH) {
    Vector right[TOKENS];
#pragma GCC unroll 4
    for (int token = 0; token < TOKENS; ++token) right[token] = load_vector(b + token * depth + k);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const Vector left = load_vector(a + i * a_stride + k);
#pragma GCC unroll 4
      for (int token = 0; token < TOKENS; ++token) sums[token][i] += left * right[token];
    }
  }
  for (int token = 0; token < TOKENS; ++token) {
    for (int i = 0; i < ROWS; ++i) {
      float sum = total(sums[token][i]);
      for (int64_t rest = k; rest < depth; ++rest) sum += a[i * a_stride + rest] * b[token * depth + rest];
      c[token * c_stride + i] = sum;
    }
  }
}

}  // namespace erniem_fast

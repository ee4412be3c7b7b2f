// The inner loops of a float32 matrix product on a CPU, for operands that lie in the caches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

inline int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// The most rows of a tile with `VECTORS` vectors a row whose sums stay in registers: of 32 with AVX-512, else of 16.
template <int VECTORS>
constexpr int TILE_ROWS = WIDTH == 16 ? (VECTORS == 1 ? 8 : VECTORS == 2 ? 12 : VECTORS == 3 ? 8 : 6)
                                      : (VECTORS == 1 ? 8 : VECTORS == 2 ? 6 : VECTORS == 3 ? 3 : 2);

// c = a b, where a has ROWS rows and `depth` columns, b `depth` rows and VECTORS * WIDTH columns. `ahead` is called
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

// c[token, i] = the product of rows i of a and token of b, each `depth` long; for tokens too few to fill vectors.
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

// ---- Transposition

// Exchanges the lanes of `a` that have the bit STEP in their index with those of `b` that have it not.
template <int STEP, int... I>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
  const Vector upper = pick(a, b, std::integer_sequence<int, (I & STEP ? WIDTH + I - STEP : I)...>());
  b = pick(a, b, std::integer_sequence<int, (I & STEP ? WIDTH + I : I + STEP)...>());
  a = upper;
}

// Transposes WIDTH vectors: swaps the off-diagonal quarters of the square, then those of each quarter, and so on.
template <int STEP = WIDTH / 2>
inline void transpose_square(Vector* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) {
    if ((i & STEP) == 0) exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, WIDTH>());
  }
  if constexpr (STEP > 1) transpose_square<STEP / 2>(rows);
}

// to[j, i] = from[i, j]. Rows of `to` are whole vectors, with zeros behind the `rows` elements.
inline void transpose(const float* from, int64_t rows, int64_t from_stride, int64_t columns, float* to,
                      int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += WIDTH) {
    const int64_t width = std::min<int64_t>(WIDTH, columns - j);
    for (int64_t i = 0; i < rows; i += WIDTH) {
      Vector square[WIDTH];
      const int64_t height = std::min<int64_t>(WIDTH, rows - i);
      for (int64_t row = 0; row < WIDTH; ++row) {
        const float* start = from + (i + row) * from_stride + j;
        square[row] = Vector();
        if (row >= height) continue;
        if (width == WIDTH) {
          square[row] = load_vector(start);
        } else {
          memcpy(&square[row], start, width * sizeof(float));
        }
      }
      transpose_square(square);
      for (int64_t column = 0; column < width; ++column) {
        memcpy(to + (j + column) * to_stride + i, &square[column], sizeof(Vector));
      }
    }
  }
}

// The transposition of a float32 matrix on a CPU, in squares of vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace erniem_fast {

// Exchanges the lanes of `a` whose index has the bit STEP set with the lanes of `b` whose index does not.
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

// to[j, i] = from[i, j]. Rows of `to` are whole vectors: zeros follow the `rows` elements.
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

}  // namespace erniem_fast

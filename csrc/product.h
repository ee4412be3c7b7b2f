// The inner loops of a float32 matrix product on a CPU, for operands that lie in the caches.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

inline Vector load_vector(const float* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

// The most rows of a tile with `VECTORS` vectors a row whose sums stay in registers: of 32 with AVX-512, else of 16.
template <int VECTORS>
constexpr int TILE_ROWS = WIDTH == 16 ? (VECTORS == 1 ? 16 : VECTORS == 2 ? 12 : VECTORS == 3 ? 8 : 6)
                                      : (VECTORS == 1 ? 8 : VECTORS == 2 ? 6 : VECTORS == 3 ? 3 : 2);

// c = a b, where a has ROWS rows and `depth` columns, b `depth` rows and VECTORS * WIDTH columns. `ahead` is called once
// for every step of the depth.
template <int ROWS, int VECTORS, typename Ahead>
inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                          int64_t depth, const Ahead& ahead) {
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

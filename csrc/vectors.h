// Vectors of as many float32 lanes as the CPU's registers hold.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "elements.h"

namespace erniem_fast {

// Wider vectors than a register's are taken apart by the compiler, through memory: at 8 lanes, products on SSE or NEON
// took ten times as long as at 4.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

inline Vector load_vector(const float* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

// Keeps the compiler from joining the product that gave x with a sum that follows, which would round only once.
inline Vector rounded_now(Vector x) {
#ifdef __x86_64__
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

typedef uint32_t VectorBits __attribute__((vector_size(sizeof(Vector))));

inline VectorBits as_bits(Vector x) { return bit_cast<VectorBits>(x); }

inline Vector as_float(VectorBits bits) { return bit_cast<Vector>(bits); }

// Lanes I... of the concatenation of a and b.
template <int... I>
inline Vector pick(Vector a, Vector b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  typedef int Lanes __attribute__((vector_size(sizeof(Vector))));
  return __builtin_shuffle(a, b, Lanes{I...});
#endif
}

// Combines all lanes into one: the lower half with the upper half, then the halves of the result, and so on.
template <typename Combine, int STEP = WIDTH / 2, int... I>
inline float reduce(Vector x, const Combine& combine, std::integer_sequence<int, I...> lanes) {
  x = combine(x, pick(x, x, std::integer_sequence<int, (I ^ STEP)...>()));
  if constexpr (STEP == 1) {
    return x[0];
  } else {
    return reduce<Combine, STEP / 2>(x, combine, lanes);
  }
}

inline float total(Vector x) {
  const auto sum = [](Vector a, Vector b) { return a + b; };
  return reduce(x, sum, std::make_integer_sequence<int, WIDTH>());
}

inline float largest(Vector x) {
  const auto larger = [](Vector a, Vector b) { return a > b ? a : b; };
  return reduce(x, larger, std::make_integer_sequence<int, WIDTH>());
}

}  // namespace erniem_fast

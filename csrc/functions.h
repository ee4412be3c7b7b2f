// exp and the normal distribution in float32, without branches, so that the compiler vectorises loops that call them.
// It cannot do that with the standard library's functions.
#pragma once

#include <cmath>

#include "elements.h"
#include "vectors.h"

namespace erniem_fast {

// e^x for x <= 0, a number or a vector of them, within 2e-7 of its value; exactly 0 below -87, near the smallest normal
// number.
template <typename Float>
inline Float exponential(Float x) {
  const Float least = Float() - 87.0f, bounded = x < least ? least : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to a whole number, which its last bits hold
  const Float shifted = bounded * 1.44269504f + magic;
  const Float whole = shifted - magic;
  // ln(2) in two parts; the first has so few digits that its product is exact.
  const Float rest = bounded - whole * 0.693359375f - whole * -2.12194440e-4f;
  Float power = Float() + 1.0f / 5040.0f;  // Taylor's series on [-0.35, 0.35]; the next term is below 6e-9
  power = power * rest + 1.0f / 720.0f;
  power = power * rest + 1.0f / 120.0f;
  power = power * rest + 1.0f / 24.0f;
  power = power * rest + 1.0f / 6.0f;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  const Float scale = as_float((as_bits(shifted) - as_bits(magic) + 127u) << 23);
  return x < least ? Float() : power * scale;
}

// The normal distribution's density at x, and its probability below -|x|.
struct Normal {
  float density, tail;
};

// The tail is e^(-x^2 / 2) times a polynomial in 1 / (1 + 0.35 |x|), fitted to a relative error of 3.2e-8 on [0, 14].
inline Normal normal(float x) {
  const float size = fabsf(x) > 20.0f ? 20.0f : fabsf(x);
  const float t = 1.0f / (1.0f + 0.35f * size);
  float ratio = -0.029145287f;
  ratio = ratio * t + 0.14396879f;
  ratio = ratio * t - 0.25570869f;
  ratio = ratio * t + 0.15916832f;
  ratio = ratio * t - 0.023106126f;
  ratio = ratio * t + 0.10550656f;
  ratio = ratio * t + 0.11983320f;
  ratio = ratio * t + 0.13986182f;
  ratio = ratio * t + 0.13962141f;
  const float power = exponential(-0.5f * size * size);
  return {power * 0.39894228f, power * t * ratio};
}

}  // namespace erniem_fast

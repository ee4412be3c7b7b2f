// Rounds a token's row to unsigned integers: the same bits as `quantise_tokens` of erniem_fast/reference.py.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace erniem_fast {

// x = scale (q - zero) but for rounding.
struct Rounding {
  float scale;  // 0 for a row of zeros; NaN or infinite, with integers 0, for a row without a finite range
  int32_t zero;
};

// The extent of a row's values, which includes 0.
class Extent {
 public:
  Extent(const float* x, int64_t size) {
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) include(load_vector(x + i));
    Vector rest = {};
    memcpy(&rest, x + i, (size - i) * sizeof(float));
    include(rest);
  }

  float below() const { return largest(below_zero); }  // the distance from the least element to 0
  float size() const { return below() + largest(above_zero) + total(poison); }

 private:
  void include(Vector x) {
    below_zero = -x > below_zero ? -x : below_zero;
    above_zero = x > above_zero ? x : above_zero;
    poison += x - x;
  }

  Vector below_zero = {}, above_zero = {}, poison = {};  // poison is NaN if an element is NaN or infinite, else 0
};

// Writes `size` integers, each at most `levels`.
inline Rounding quantise_row(const float* x, int64_t size, int levels, uint8_t* to) {
  const Extent range(x, size);
  const float scale = range.size() / float(levels);
  if (!(scale >= FLT_MIN)) {
    memset(to, 0, size);
    return {scale < FLT_MIN ? 0.0f : NAN, 0};
  }
  const float inverse = 1.0f / scale, zero = rintf(range.below() * inverse), most = float(levels);
  for (int64_t i = 0; i < size; ++i) {
    const float value = rintf(x[i] * inverse) + zero;  // not below 0, because no element is further below 0 than `zero`
    to[i] = uint8_t(int32_t(value > most ? most : value));
  }
  return {scale, int32_t(zero)};
}

}  // namespace erniem_fast

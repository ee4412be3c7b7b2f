// The elements of tensors, one source for host and device: their dtypes, and conversion to and from float32.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace erniem_fast {

enum Dtype { FLOAT32, FLOAT16, BFLOAT16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The bits of a value as another type of the same size.
template <typename To, typename From>
HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the types must have the same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

HOST_DEVICE uint32_t as_bits(float x) { return bit_cast<uint32_t>(x); }

HOST_DEVICE float as_float(uint32_t bits) { return bit_cast<float>(bits); }

// Reads what no kernel of the launch writes, so that the load need not wait for stores that come before it.
template <typename T>
HOST_DEVICE T read(const T* from) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) % sizeof(uint4) == 0) {
    uint4 parts[sizeof(T) / sizeof(uint4)];
    for (int i = 0; i < int(sizeof(T) / sizeof(uint4)); ++i) parts[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    T value;
    memcpy(&value, parts, sizeof value);
    return value;
  } else {
    return __ldg(from);
  }
#else
  return *from;
#endif
}

HOST_DEVICE float to_float(float x) { return x; }

HOST_DEVICE float to_float(int8_t x) { return float(x); }

HOST_DEVICE float to_float(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }

HOST_DEVICE float to_float(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = x.bits & 0x7fff;
  const float normal = as_float((magnitude << 13) + (112u << 23));  // the exponents' biases differ by 112
  const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
  const float special = as_float((magnitude << 13) | 0x7f800000);
  const float absolute = magnitude < 0x400 ? subnormal : magnitude < 0x7c00 ? normal : special;
  return as_float(as_bits(absolute) | uint32_t(x.bits & 0x8000) << 16);
#endif
}

HOST_DEVICE void from_float(float x, float& to) { to = x; }

// The conversions to 16 bits round to nearest, ties to even.
HOST_DEVICE void from_float(float x, BFloat16& to) {
#ifdef __CUDA_ARCH__
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
#endif
}

HOST_DEVICE void from_float(float x, Half& to) {
#ifdef __CUDA_ARCH__
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t magnitude = as_bits(x) & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // units of 0.5 are those of halves
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t bits = magnitude < 0x38800000 ? subnormal : magnitude < 0x47800000 ? normal : special;
  to.bits = uint16_t(bits | (as_bits(x) >> 16 & 0x8000));
#endif
}

// Calls `body` with an element of the dtype's type.
template <typename Body>
auto with_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case FLOAT16:
      return body(Half());
    case BFLOAT16:
      return body(BFloat16());
    default:
      return body(float());
  }
}

}  // namespace erniem_fast

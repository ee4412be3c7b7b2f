// Rows of elements, one source for host and device: dtypes, access and the layer norm's statistics.
//
// A row is the work of `lanes.count` lanes; each takes every count-th piece of `Lanes::piece` neighbouring elements.
// On a GPU the lanes are the threads of a warp and a piece is what one or two 16-byte accesses move. On a CPU a single
// lane has long pieces, whose loops the compiler turns into vector instructions. Arithmetic is in float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

// ---- Elements

enum Dtype { FLOAT32, FLOAT16, BFLOAT16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

HOST_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

HOST_DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

HOST_DEVICE float to_float(float x) { return x; }

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

// Both round to nearest, ties to even.
HOST_DEVICE void from_float(float x, BFloat16& to) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
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

// ---- Pieces of a row

template <int N>
struct alignas(16) Piece {
  float x[N];
};

template <typename T, int N>
struct alignas(16) Packed {
  T x[N];
};

// A number of elements that the compiler knows.
template <int N>
struct Whole {
  HOST_DEVICE constexpr operator int() const { return N; }
};

template <typename Lanes, typename T, typename Count>
HOST_DEVICE Piece<Lanes::piece> load(const T* from, Count count) {
  constexpr int N = Lanes::piece;
  Piece<N> piece = {};
  if constexpr (Lanes::aligned) {
    const auto packed = *reinterpret_cast<const Packed<T, N>*>(from);
    for (int i = 0; i < N; ++i) piece.x[i] = to_float(packed.x[i]);
  } else {
    for (int i = 0; i < count; ++i) piece.x[i] = to_float(from[i]);
  }
  return piece;
}

template <typename Lanes, typename T, typename Count>
HOST_DEVICE void store(T* to, const Piece<Lanes::piece>& piece, Count count) {
  constexpr int N = Lanes::piece;
  if constexpr (Lanes::aligned) {
    Packed<T, N> packed;
    for (int i = 0; i < N; ++i) from_float(piece.x[i], packed.x[i]);
    *reinterpret_cast<Packed<T, N>*>(to) = packed;
  } else {
    for (int i = 0; i < count; ++i) from_float(piece.x[i], to[i]);
  }
}

HOST_DEVICE int pieces_of(int64_t hidden, int piece) { return int((hidden + piece - 1) / piece); }

// Calls `body(piece, count)` for each of the lane's pieces; only the last of a row can have fewer elements than N.
template <typename Lanes, typename Body>
HOST_DEVICE void for_pieces(const Lanes& lanes, int64_t hidden, const Body& body) {
  constexpr int N = Lanes::piece;
  const int whole = int(hidden / N);
  int piece = lanes.lane;
  for (; piece < whole; piece += lanes.count) body(piece, Whole<N>());
  if constexpr (!Lanes::aligned) {
    if (piece == whole && hidden % N != 0) body(piece, int(hidden % N));
  }
}

// The sum of `term(piece, i)` over a row's elements, known to all of its lanes.
template <typename Lanes, typename Term>
HOST_DEVICE float row_sum(const Lanes& lanes, int64_t hidden, const Term& term) {
  constexpr int N = Lanes::piece;
  Piece<N> sums = {};
  for_pieces(lanes, hidden, [&](int piece, auto count) {
    for (int i = 0; i < count; ++i) sums.x[i] += term(piece, i);
  });
  for (int width = N / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums.x[i] += sums.x[i + width];
  }
  return lanes.sum(sums.x[0]);
}

// ---- Chunks of tokens, whose sums are apart

template <typename Op>
HOST_DEVICE int64_t chunks_of(const Op& op) {
  return (op.tokens + op.tokens_per_chunk - 1) / op.tokens_per_chunk;
}

// ---- Layer norm

// What subtracting the mean leaves of a row, in place, and 1 / its standard deviation. The mean is taken off twice, as
// in `normalise` of erniem_fast/reference.py: rounding the first one leaves all elements off by the same few units.
template <typename Lanes>
HOST_DEVICE float centre(const Lanes& lanes, int64_t hidden, double eps, Piece<Lanes::piece>* row) {
  const float mean = row_sum(lanes, hidden, [&](int piece, int i) { return row[piece].x[i]; }) / float(hidden);
  const float left = row_sum(lanes, hidden, [&](int piece, int i) { return row[piece].x[i] -= mean; }) / float(hidden);
  const float squares = row_sum(lanes, hidden, [&](int piece, int i) {
    const float centred = row[piece].x[i] -= left;
    return centred * centred;
  });
  return 1.0f / sqrtf(squares / float(hidden) + float(eps));
}

// The gradient of a row, in place of that of its layer norm, `grad_y`; adds the row's share to those of weight and
// norm_bias. `row` holds the row and is left normalised.
template <typename Lanes>
HOST_DEVICE void layer_norm_backward(const Lanes& lanes, int64_t hidden, const float* norm_weight, double eps,
                                     Piece<Lanes::piece>* row, Piece<Lanes::piece>* grad_y,
                                     Piece<Lanes::piece>* grad_weight, Piece<Lanes::piece>* grad_norm_bias) {
  constexpr int N = Lanes::piece;
  const float rstd = centre(lanes, hidden, eps, row);
  for_pieces(lanes, hidden, [&](int piece, auto count) {
    const Piece<N> weight = load<Lanes>(norm_weight + piece * N, count);
    for (int i = 0; i < N; ++i) {
      row[piece].x[i] *= rstd;
      grad_weight[piece].x[i] += grad_y[piece].x[i] * row[piece].x[i];
      grad_norm_bias[piece].x[i] += grad_y[piece].x[i];
      grad_y[piece].x[i] *= weight.x[i];
    }
  });
  const float mean = row_sum(lanes, hidden, [&](int piece, int i) { return grad_y[piece].x[i]; }) / float(hidden);
  const float slope =
      row_sum(lanes, hidden, [&](int piece, int i) { return grad_y[piece].x[i] * row[piece].x[i]; }) / float(hidden);
  for_pieces(lanes, hidden, [&](int piece, auto) {
    for (int i = 0; i < N; ++i) grad_y[piece].x[i] = rstd * (grad_y[piece].x[i] - mean - row[piece].x[i] * slope);
  });
}

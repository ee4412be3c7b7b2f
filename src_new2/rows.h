// Rows of elements, one source for host and device: access, sums over chunks of tokens, and the layer norm.
//
// A row is the work of `lanes.count` lanes; each takes every count-th piece of `Lanes::piece` neighbouring elements.
// On a GPU the lanes are the threads of a warp, and one or two accesses of 16 bytes move a piece. On a CPU there is one
// lane with long pieces, so that the compiler vectorises the loops over them. Arithmetic is in float32.
//
// Between passes a row is kept in a `Row`: something that gives the piece with an index, at least for those of the
// lane.
#pragma once

#include <cmath>

#include "elements.h"

namespace erniem_fast {

// ---- Pieces of a row

template <int N>
struct alignas(16) Piece {
  float x[N];
};

template <typename T, int N>
struct alignas(16) Packed {
  T x[N];
};

// The number of elements of a whole piece, as a constant.
template <int N>
struct Whole {
  HOST_DEVICE constexpr operator int() const { return N; }
};

template <typename Lanes, typename T, typename Count>
HOST_DEVICE Piece<Lanes::piece> load(const T* from, Count count) {
  constexpr int N = Lanes::piece;
  Piece<N> piece = {};
  if constexpr (Lanes::aligned) {
    const Packed<T, N> packed = read(reinterpret_cast<const Packed<T, N>*>(from));
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

// Calls `body(piece, count)` for each of the lane's pieces; only the last piece of a row can have less than N elements.
// `Lanes::held` is their number where it is known to the compiler, otherwise 0.
template <typename Lanes, typename Body>
HOST_DEVICE void for_pieces(const Lanes& lanes, int64_t hidden, const Body& body) {
  constexpr int N = Lanes::piece;
  if constexpr (Lanes::held > 0) {
#pragma unroll
    for (int i = 0; i < Lanes::held; ++i) body(lanes.lane + i * lanes.count, Whole<N>());
    return;
  }
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

// ---- Chunks of tokens: each has its own sums over its tokens

template <typename Op>
HOST_DEVICE int64_t chunks_of(const Op& op) {
  return (op.tokens + op.tokens_per_chunk - 1) / op.tokens_per_chunk;
}

// ---- Layer norm

// Subtracts the mean from a row in place; returns 1 / the standard deviation. The mean is subtracted twice, as in
// `normalise` of erniem_fast/reference.py, because rounding the first one leaves the same small error in all elements.
template <typename Lanes, typename Row>
HOST_DEVICE float centre(const Lanes& lanes, int64_t hidden, double eps, Row& row) {
  const float mean = row_sum(lanes, hidden, [&](int piece, int i) { return row[piece].x[i]; }) / float(hidden);
  const float left = row_sum(lanes, hidden, [&](int piece, int i) { return row[piece].x[i] -= mean; }) / float(hidden);
  const float squares = row_sum(lanes, hidden, [&](int piece, int i) {
    const float centred = row[piece].x[i] -= left;
    return centred * centred;
  });
  return 1.0f / sqrtf(squares / float(hidden) + float(eps));
}

// Turns `grad_y`, the gradient of a row's layer norm, into the gradient of the row; adds the row's share to the
// gradients of weight and norm_bias. `row` holds the row and is normalised in place.
template <typename Lanes, typename Row>
HOST_DEVICE void layer_norm_backward(const Lanes& lanes, int64_t hidden, const float* norm_weight, double eps, Row& row,
                                     Row& grad_y, Row& grad_weight, Row& grad_norm_bias) {
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

}  // namespace erniem_fast

// Rows on a CPU: one thread computes a row, and torch's threads share the rows.
#pragma once

#include <vector>

#include "parallel.h"
#include "rows.h"

namespace erniem_fast {

// One lane. A piece of 64 elements is four vectors of AVX-512, so that their additions overlap.
struct Thread {
  static constexpr int piece = 64;
  static constexpr bool aligned = false;
  static constexpr int held = 0;
  static constexpr int lane = 0;
  static constexpr int count = 1;
  float sum(float x) const { return x; }
};

using Row = std::vector<Piece<Thread::piece>>;

// Calls `body(i, scratch)` for i in [0, size), where each call costs as much as `elements` pointwise operations;
// `scratch` is `rows` rows of the thread's own.
template <typename Body>
void parallel_rows(ParallelFor run, int64_t size, int64_t elements, int64_t hidden, int rows, const Body& body) {
  parallel(run, size, elements, [&](int64_t begin, int64_t end) {
    Row scratch(size_t(rows) * pieces_of(hidden, Thread::piece));
    for (int64_t i = begin; i < end; ++i) body(i, scratch.data());
  });
}

// Sets `pieces` sums to zero, then calls `body(token)` for a chunk's tokens, one after another.
template <typename Op, typename Body>
void for_chunk(const Op& op, int64_t chunk, Piece<Thread::piece>* sums, int pieces, const Body& body) {
  for (int piece = 0; piece < pieces; ++piece) sums[piece] = {};
  const int64_t begin = chunk * op.tokens_per_chunk, end = begin + op.tokens_per_chunk;
  for (int64_t token = begin; token < end && token < op.tokens; ++token) body(token);
}

inline void store_row(const Piece<Thread::piece>* row, float* to, int64_t size) {
  for_pieces(Thread(), size,
             [&](int piece, auto count) { store<Thread>(to + piece * Thread::piece, row[piece], count); });
}

}  // namespace erniem_fast

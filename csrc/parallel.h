// Work of the CPU's ops on torch's threads.
#pragma once

#include <vector>

#include "rows.h"

// `torch_parallel_for` of torch's stable ABI. It comes as an argument, so that this file needs no part of torch to be
// built and one build serves every version that has the function.
using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range range, void* context);

// A single lane; 64 elements are four vectors of AVX-512, so that their additions overlap.
struct Thread {
  static constexpr int piece = 64;
  static constexpr bool aligned = false;
  static constexpr int lane = 0;
  static constexpr int count = 1;
  float sum(float x) const { return x; }
};

using Row = std::vector<Piece<Thread::piece>>;

// What a thread must get to do to be worth waking, in elements: that of torch's own pointwise kernels.
constexpr int64_t GRAIN = 32768;

// Calls `range(begin, end)` for parts of [0, size), of which each index costs as much as `elements` pointwise ones.
template <typename Body>
const char* parallel(ParallelFor run, int64_t size, int64_t elements, const Body& range) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  const int64_t grain = 1 + GRAIN / (1 + elements);
  const bool done = run(0, size, grain, call, const_cast<void*>(static_cast<const void*>(&range))) == 0;
  return done ? nullptr : "torch_parallel_for failed";
}

// Calls `body(i, scratch)` for i in [0, size), of which each costs `elements`; `rows` rows of scratch a thread.
template <typename Body>
const char* parallel_rows(ParallelFor run, int64_t size, int64_t elements, int64_t hidden, int rows, const Body& body) {
  return parallel(run, size, elements, [&](int64_t begin, int64_t end) {
    Row scratch(size_t(rows) * pieces_of(hidden, Thread::piece));
    for (int64_t i = begin; i < end; ++i) body(i, scratch.data());
  });
}

// Calls `body(token)` for a chunk's tokens, one after another, with `pieces` sums that begin at zero.
template <typename Op, typename Body>
void for_chunk(const Op& op, int64_t chunk, Piece<Thread::piece>* sums, int pieces, const Body& body) {
  for (int piece = 0; piece < pieces; ++piece) sums[piece] = {};
  const int64_t begin = chunk * op.tokens_per_chunk, end = begin + op.tokens_per_chunk;
  for (int64_t token = begin; token < end && token < op.tokens; ++token) body(token);
}

inline void store_row(const Piece<Thread::piece>* row, float* to, int64_t size) {
  for_pieces(Thread(), size, [&](int piece, auto count) {
    store<Thread>(to + piece * Thread::piece, row[piece], count);
  });
}

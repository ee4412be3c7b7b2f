// The `embeddings` op on a CPU: rows in parallel on torch's threads, vector instructions from the compiler.
#include <vector>

#include "embeddings.h"

// `torch_parallel_for` of torch's stable ABI. It comes as an argument, so that this file needs no part of torch to be
// built and one build serves every version that has the function.
using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range range, void* context);

namespace {

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

// Calls `body(i, scratch)` for i in [0, size), of which each costs `elements`; `rows` rows of scratch a thread.
template <typename Body>
const char* parallel(ParallelFor run, int64_t size, int64_t elements, int64_t hidden, int rows, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    Row scratch(size_t(rows) * pieces_of(hidden, Thread::piece));
    for (int64_t i = begin; i < end; ++i) body(i, scratch.data());
  };
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const decltype(range)*>(context))(begin, end);
  };
  const int64_t grain = 1 + GRAIN / (1 + elements);
  const bool done = run(0, size, grain, call, const_cast<void*>(static_cast<const void*>(&range))) == 0;
  return done ? nullptr : "torch_parallel_for failed";
}

}  // namespace

// Each returns null, or what went wrong.

extern "C" const char* embeddings_forward(const Forward* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel(run, op->tokens, op->hidden, op->hidden, 1, [&](int64_t token, auto* scratch) {
      forward_row<decltype(element)>(Thread(), *op, token, scratch);
    });
  });
}

extern "C" const char* embeddings_backward(const Backward* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel(run, op->chunks, op->tokens_per_chunk * op->hidden, op->hidden, 4, [&](int64_t chunk, auto* scratch) {
      backward_chunk<decltype(element)>(Thread(), *op, chunk, scratch);
    });
  });
}

extern "C" const char* embeddings_scatter(const Scatter* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel(run, op->tokens, op->hidden, op->hidden, 0, [&](int64_t first, auto*) {
      scatter_run<decltype(element)>(Thread(), *op, first);
    });
  });
}

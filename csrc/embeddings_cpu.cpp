// The `embeddings` op on a CPU: rows in parallel on torch's threads, vector instructions from the compiler.
#include "embeddings.h"
#include "parallel.h"

// Each returns null, or what went wrong.

extern "C" const char* embeddings_forward(const Forward* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, op->tokens, op->hidden, op->hidden, 1, [&](int64_t token, auto* scratch) {
      forward_row<decltype(element)>(Thread(), *op, token, scratch);
    });
  });
}

extern "C" const char* embeddings_backward(const Backward* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, op->chunks, op->tokens_per_chunk * op->hidden, op->hidden, 4, [&](int64_t chunk, auto* scratch) {
      backward_chunk<decltype(element)>(Thread(), *op, chunk, scratch);
    });
  });
}

extern "C" const char* embeddings_scatter(const Scatter* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, op->tokens, op->hidden, op->hidden, 0, [&](int64_t first, auto*) {
      scatter_run<decltype(element)>(Thread(), *op, first);
    });
  });
}

// The `embeddings` op on a CPU: rows in parallel on torch's threads, vector instructions from the compiler.
#include "embeddings.h"
#include "parallel.h"

// Each returns null, or what went wrong.

extern "C" const char* embeddings_forward(const EmbeddingsForward* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, op->tokens, op->hidden, op->hidden, 1, [&](int64_t token, auto* scratch) {
      embeddings_forward_row<decltype(element)>(Thread(), *op, token, scratch);
    });
  });
}

extern "C" const char* embeddings_backward(const EmbeddingsBackward* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, chunks_of(*op), op->tokens_per_chunk * op->hidden, op->hidden, 4, [&](int64_t chunk, auto* scratch) {
      embeddings_backward_chunk<decltype(element)>(Thread(), *op, chunk, scratch);
    });
  });
}

extern "C" const char* embeddings_scatter(const EmbeddingsScatter* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, op->tokens, op->hidden, op->hidden, 0, [&](int64_t first, auto*) {
      embeddings_scatter_run<decltype(element)>(Thread(), *op, first);
    });
  });
}

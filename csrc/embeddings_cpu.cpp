// The `embeddings` op on a CPU: rows run in parallel on torch's threads, and the compiler vectorises their loops.
#include "boundary.h"
#include "embeddings.h"
#include "rows_cpu.h"

namespace erniem_fast {

namespace {

// Elements are `T`, and those of the word table `W`.
template <typename T, typename W>
void forward(const EmbeddingsForward& op, ParallelFor run) {
  parallel_rows(run, op.tokens, op.hidden, op.hidden, 1,
                [&](int64_t token, auto* scratch) { embeddings_forward_row<T, W>(Thread(), op, token, scratch); });
}

}  // namespace

extern "C" const char* embeddings_forward(const EmbeddingsForward* op, int dtype, ParallelFor run) {
  return error_of(
      [&] { with_dtype(dtype, [&](auto element) { forward<decltype(element), decltype(element)>(*op, run); }); });
}

// Of a model in float32 with a word table in bfloat16, and in int8.

extern "C" const char* embeddings_bfloat16_forward(const EmbeddingsForward* op, int, ParallelFor run) {
  return error_of([&] { forward<float, BFloat16>(*op, run); });
}

extern "C" const char* embeddings_int8_forward(const EmbeddingsForward* op, int, ParallelFor run) {
  return error_of([&] { forward<float, int8_t>(*op, run); });
}

extern "C" const char* embeddings_backward(const EmbeddingsBackward* op, int dtype, ParallelFor run) {
  const int64_t work = op->tokens_per_chunk * op->hidden;
  const int pieces = pieces_of(op->hidden, Thread::piece);
  return error_of([&] {
    with_dtype(dtype, [&](auto element) {
      parallel_rows(run, chunks_of(*op), work, op->hidden, 4, [&](int64_t chunk, auto* scratch) {
        auto *grad_y = scratch + pieces, *grad_weight = grad_y + pieces, *grad_norm_bias = grad_weight + pieces;
        embeddings_backward_chunk<decltype(element)>(Thread(), *op, chunk, scratch, grad_y, grad_weight,
                                                     grad_norm_bias);
      });
    });
  });
}

extern "C" const char* embeddings_scatter(const EmbeddingsScatter* op, int dtype, ParallelFor run) {
  const int64_t work = op->tokens_per_chunk * op->hidden;
  return error_of([&] {
    with_dtype(dtype, [&](auto element) {
      using T = decltype(element);
      parallel_rows(run, chunks_of(*op), work, op->hidden, 0,
                    [&](int64_t chunk, auto*) { embeddings_scatter_chunk<T>(Thread(), *op, chunk); });
      parallel_rows(run, chunks_of(*op), op->hidden, op->hidden, 0,
                    [&](int64_t chunk, auto*) { embeddings_scatter_join<T>(Thread(), *op, chunk); });
    });
  });
}

extern "C" const char* embeddings_clear(const EmbeddingsClear* op, int dtype, ParallelFor run) {
  return error_of([&] {
    with_dtype(dtype, [&](auto element) {
      parallel_rows(run, op->tokens, op->hidden, op->hidden, 0,
                    [&](int64_t token, auto*) { embeddings_clear_row<decltype(element)>(Thread(), *op, token); });
    });
  });
}

}  // namespace erniem_fast

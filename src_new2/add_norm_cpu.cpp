// The `add_norm` op on a CPU, forward and backward.
#include "boundary.h"
#include "dropout.h"
#include "ops.h"
#include "rows_cpu.h"

namespace erniem_fast {

struct AddNormBackward {
  const void* grad;             // (tokens, hidden) elements
  const void* z;                // (tokens, hidden) elements
  const float* weight;          // (hidden,)
  const int64_t* columns;       // (tokens,) or null
  const int64_t* sequence_ids;  // (tokens,) or null
  const int64_t* seed;          // (1,) or null
  void* grad_residual;          // (tokens, hidden) elements
  void* grad_x;                 // (tokens, hidden) elements, or null where it equals `grad_residual`
  float* sums;  // (chunks, 3, hidden), each chunk's share of the gradients of weight, norm_bias and bias
  int64_t tokens, tokens_per_chunk, hidden, threshold;
  double eps, rescale;
};

namespace {

constexpr int N = Thread::piece;

// `row` is scratch for one row.
template <typename T>
void forward_row(const AddNormForward& op, int64_t token, Piece<N>* row) {
  const int64_t start = token * op.hidden;
  for_pieces(Thread(), op.hidden, [&](int piece, auto count) {
    const Piece<N> residual = load<Thread>(static_cast<const T*>(op.residual) + start + piece * N, count);
    Piece<N> x = load<Thread>(static_cast<const T*>(op.x) + start + piece * N, count);
    if (op.bias != nullptr) {
      const Piece<N> bias = load<Thread>(op.bias + piece * N, count);
      for (int i = 0; i < N; ++i) x.x[i] += bias.x[i];
    }
    drop(op, token, piece, x);
    for (int i = 0; i < N; ++i) row[piece].x[i] = residual.x[i] + x.x[i];
    if (op.z != nullptr) store<Thread>(static_cast<T*>(op.z) + start + piece * N, row[piece], count);
  });
  const float rstd = centre(Thread(), op.hidden, op.eps, row);
  for_pieces(Thread(), op.hidden, [&](int piece, auto count) {
    const Piece<N> weight = load<Thread>(op.weight + piece * N, count);
    const Piece<N> norm_bias = load<Thread>(op.norm_bias + piece * N, count);
    Piece<N> y;
    for (int i = 0; i < N; ++i) y.x[i] = row[piece].x[i] * rstd * weight.x[i] + norm_bias.x[i];
    store<Thread>(static_cast<T*>(op.out) + start + piece * N, y, count);
  });
}

// Prefetches the next row: work on a row takes so long that the processor does not fetch the next one by itself.
template <typename T>
void prefetch_piece(const T* from) {
  for (int i = 0; i < N; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// `scratch` holds two rows, followed by the sums for weight, norm_bias and bias.
template <typename T>
void backward_row(const AddNormBackward& op, int64_t token, Piece<N>* scratch) {
  const int64_t start = token * op.hidden;
  const int pieces = pieces_of(op.hidden, N);
  Piece<N>*row = scratch, *grad_y = scratch + pieces;
  Piece<N>*grad_weight = grad_y + pieces, *grad_norm_bias = grad_weight + pieces, *grad_bias = grad_norm_bias + pieces;
  for_pieces(Thread(), op.hidden, [&](int piece, auto count) {
    const T* z = static_cast<const T*>(op.z) + start + piece * N;
    const T* grad = static_cast<const T*>(op.grad) + start + piece * N;
    prefetch_piece(z + op.hidden);
    prefetch_piece(grad + op.hidden);
    row[piece] = load<Thread>(z, count);
    grad_y[piece] = load<Thread>(grad, count);
  });
  layer_norm_backward(Thread(), op.hidden, op.weight, op.eps, row, grad_y, grad_weight, grad_norm_bias);
  for_pieces(Thread(), op.hidden, [&](int piece, auto count) {
    Piece<N> grad_x = grad_y[piece];
    store<Thread>(static_cast<T*>(op.grad_residual) + start + piece * N, grad_x, count);
    drop(op, token, piece, grad_x);
    for (int i = 0; i < N; ++i) grad_bias[piece].x[i] += grad_x.x[i];
    if (op.grad_x != nullptr) store<Thread>(static_cast<T*>(op.grad_x) + start + piece * N, grad_x, count);
  });
}

}  // namespace

extern "C" const char* add_norm_forward(const AddNormForward* op, int dtype, ParallelFor run) {
  return error_of([&] {
    with_dtype(dtype, [&](auto element) {
      parallel_rows(run, op->tokens, op->hidden, op->hidden, 1,
                    [&](int64_t token, auto* row) { forward_row<decltype(element)>(*op, token, row); });
    });
  });
}

extern "C" const char* add_norm_backward(const AddNormBackward* op, int dtype, ParallelFor run) {
  const int64_t work = op->tokens_per_chunk * op->hidden;
  const int pieces = pieces_of(op->hidden, N);
  return error_of([&] {
    with_dtype(dtype, [&](auto element) {
      parallel_rows(run, chunks_of(*op), work, op->hidden, 5, [&](int64_t chunk, auto* scratch) {
        for_chunk(*op, chunk, scratch + 2 * pieces, 3 * pieces,
                  [&](int64_t token) { backward_row<decltype(element)>(*op, token, scratch); });
        for (int sum = 0; sum < 3; ++sum) {
          store_row(scratch + (2 + sum) * pieces, op->sums + (chunk * 3 + sum) * op->hidden, op->hidden);
        }
      });
    });
  });
}

}  // namespace erniem_fast

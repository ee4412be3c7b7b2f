// The `add_layernorm` op on a CPU, forward and backward.
#include "dropout.h"
#include "encoder.h"

struct AddLayernormBackward {
  const void* grad;          // (tokens, hidden) elements
  const void* z;             // (tokens, hidden) elements
  const float* weight;       // (hidden,)
  const int64_t* columns;    // (tokens,)
  const int64_t* sequences;  // (tokens,)
  const int64_t* seed;       // (1,) or null
  void* of_residual;         // (tokens, hidden) elements
  void* of_x;                // (tokens, hidden) elements, or null where it equals `of_residual`
  float* sums;               // (chunks, 3, hidden), each chunk's share of the gradients of weight, norm_bias and bias
  int64_t tokens, chunks, tokens_per_chunk, hidden, threshold;
  double eps, rescale;
};

namespace {

constexpr int N = Thread::piece;

// `row` holds a row of pieces.
template <typename T>
void forward_row(const AddLayernorm& op, int64_t token, Piece<N>* row) {
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

// Work on a row takes longer than the processor sees ahead, so it is told what the next one needs.
template <typename T>
void prefetch_piece(const T* from) {
  for (int i = 0; i < N; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// `scratch` holds two rows of pieces, and the sums of weight, norm_bias and bias behind them.
template <typename T>
void backward_row(const AddLayernormBackward& op, int64_t token, Piece<N>* scratch) {
  const int64_t start = token * op.hidden;
  const int pieces = pieces_of(op.hidden, N);
  Piece<N>*row = scratch, *of_y = scratch + pieces;
  Piece<N>*of_weight = of_y + pieces, *of_norm_bias = of_weight + pieces, *of_bias = of_norm_bias + pieces;
  for_pieces(Thread(), op.hidden, [&](int piece, auto count) {
    const T* z = static_cast<const T*>(op.z) + start + piece * N;
    const T* grad = static_cast<const T*>(op.grad) + start + piece * N;
    prefetch_piece(z + op.hidden);
    prefetch_piece(grad + op.hidden);
    row[piece] = load<Thread>(z, count);
    of_y[piece] = load<Thread>(grad, count);
  });
  layer_norm_backward(Thread(), op.hidden, op.weight, op.eps, row, of_y, of_weight, of_norm_bias);
  for_pieces(Thread(), op.hidden, [&](int piece, auto count) {
    Piece<N> of_x = of_y[piece];
    store<Thread>(static_cast<T*>(op.of_residual) + start + piece * N, of_x, count);
    drop(op, token, piece, of_x);
    for (int i = 0; i < N; ++i) of_bias[piece].x[i] += of_x.x[i];
    if (op.of_x != nullptr) store<Thread>(static_cast<T*>(op.of_x) + start + piece * N, of_x, count);
  });
}

}  // namespace

extern "C" const char* add_layernorm_forward(const AddLayernorm* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, op->tokens, op->hidden, op->hidden, 1, [&](int64_t token, auto* row) {
      forward_row<decltype(element)>(*op, token, row);
    });
  });
}

extern "C" const char* add_layernorm_backward(const AddLayernormBackward* op, int dtype, ParallelFor run) {
  const int64_t work = op->tokens_per_chunk * op->hidden;
  return with_dtype(dtype, [&](auto element) {
    return parallel_rows(run, op->chunks, work, op->hidden, 5, [&](int64_t chunk, auto* scratch) {
      const int pieces = pieces_of(op->hidden, N);
      for_chunk(*op, chunk, scratch + 2 * pieces, 3 * pieces, [&](int64_t token) {
        backward_row<decltype(element)>(*op, token, scratch);
      });
      for (int sum = 0; sum < 3; ++sum) {
        store_row(scratch + (2 + sum) * pieces, op->sums + (chunk * 3 + sum) * op->hidden, op->hidden);
      }
    });
  });
}

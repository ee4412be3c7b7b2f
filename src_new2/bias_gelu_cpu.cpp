// The `bias_gelu` op on a CPU, forward and backward.
#include "boundary.h"
#include "dropout.h"
#include "functions.h"
#include "ops.h"
#include "rows_cpu.h"

namespace erniem_fast {

struct BiasGeluBackward {
  const void* grad;             // (tokens, features) elements
  const void* x;                // (tokens, features) elements
  const float* bias;            // (features,) or null
  const int64_t* columns;       // (tokens,) or null
  const int64_t* sequence_ids;  // (tokens,) or null
  const int64_t* seed;          // (1,) or null
  void* grad_x;                 // (tokens, features) elements
  float* grad_bias;             // (chunks, features), each chunk's share, or null
  int64_t tokens, tokens_per_chunk, features, activation, threshold;
  double rescale;
};

namespace {

constexpr int N = Thread::piece;

// An activation's value and slope. The GELU is x times the normal distribution's probability below x (Hendrycks &
// Gimpel, arXiv 1606.08415); written as the positive part of x minus |x| times the tail, it loses no digits for
// negative x.
struct Gelu {
  static float value(float x) {
    const float size = fabsf(x);
    return 0.5f * x + 0.5f * size - (size > 20.0f ? 20.0f : size) * normal(x).tail;
  }
  static float slope(float x) {
    const Normal at = normal(x);
    return (x > 0.0f ? 1.0f - at.tail : at.tail) + x * at.density;
  }
};

// The approximation x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), written in the same way.
struct GeluTanh {
  static float power(float x) { return exponential(-1.59576912f * fabsf(x + 0.044715f * x * x * x)); }
  static float value(float x) {
    const float size = fabsf(x), tail = power(x);
    return 0.5f * x + 0.5f * size - (size > 20.0f ? 20.0f : size) * (tail / (1.0f + tail));
  }
  static float slope(float x) {
    const float tail = power(x), whole = 1.0f + tail;
    const float part = (x > 0.0f ? 1.0f : tail) / whole;
    return part + x * (tail / (whole * whole)) * 1.59576912f * (1.0f + 3.0f * 0.044715f * x * x);
  }
};

struct Relu {
  static float value(float x) { return x < 0.0f ? 0.0f : x; }
  static float slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};

template <typename Body>
auto with_activation(int64_t activation, const Body& body) {
  switch (activation) {
    case GELU_TANH:
      return body(GeluTanh());
    case RELU:
      return body(Relu());
    default:
      return body(Gelu());
  }
}

template <typename T, typename Op, typename Count>
Piece<N> load_biased(const Op& op, int64_t token, int piece, Count count) {
  Piece<N> x = load<Thread>(static_cast<const T*>(op.x) + token * op.features + piece * N, count);
  if (op.bias != nullptr) {
    const Piece<N> bias = load<Thread>(op.bias + piece * N, count);
    for (int i = 0; i < N; ++i) x.x[i] += bias.x[i];
  }
  return x;
}

template <typename T, typename Function>
void forward_row(const BiasGeluForward& op, int64_t token) {
  for_pieces(Thread(), op.features, [&](int piece, auto count) {
    Piece<N> y = load_biased<T>(op, token, piece, count);
    for (int i = 0; i < N; ++i) y.x[i] = Function::value(y.x[i]);
    drop(op, token, piece, y);
    store<Thread>(static_cast<T*>(op.out) + token * op.features + piece * N, y, count);
  });
}

// Adds the token's share to `grad_bias`, one row.
template <typename T, typename Function>
void backward_row(const BiasGeluBackward& op, int64_t token, Piece<N>* grad_bias) {
  for_pieces(Thread(), op.features, [&](int piece, auto count) {
    const Piece<N> x = load_biased<T>(op, token, piece, count);
    Piece<N> grad = load<Thread>(static_cast<const T*>(op.grad) + token * op.features + piece * N, count);
    drop(op, token, piece, grad);
    for (int i = 0; i < N; ++i) {
      grad.x[i] *= Function::slope(x.x[i]);
      grad_bias[piece].x[i] += grad.x[i];
    }
    store<Thread>(static_cast<T*>(op.grad_x) + token * op.features + piece * N, grad, count);
  });
}

}  // namespace

extern "C" const char* bias_gelu_forward(const BiasGeluForward* op, int dtype, ParallelFor run) {
  return error_of([&] {
    with_dtype(dtype, [&](auto element) {
      with_activation(op->activation, [&](auto function) {
        parallel_rows(run, op->tokens, op->features, 0, 0,
                      [&](int64_t token, auto*) { forward_row<decltype(element), decltype(function)>(*op, token); });
      });
    });
  });
}

extern "C" const char* bias_gelu_backward(const BiasGeluBackward* op, int dtype, ParallelFor run) {
  const int64_t work = op->tokens_per_chunk * op->features;
  const int pieces = pieces_of(op->features, N);
  return error_of([&] {
    with_dtype(dtype, [&](auto element) {
      with_activation(op->activation, [&](auto function) {
        parallel_rows(run, chunks_of(*op), work, op->features, 1, [&](int64_t chunk, auto* grad_bias) {
          for_chunk(*op, chunk, grad_bias, pieces,
                    [&](int64_t token) { backward_row<decltype(element), decltype(function)>(*op, token, grad_bias); });
          if (op->grad_bias != nullptr) store_row(grad_bias, op->grad_bias + chunk * op->features, op->features);
        });
      });
    });
  });
}

}  // namespace erniem_fast

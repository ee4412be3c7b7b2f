// The `attention` op on a CPU, forward and backward: a task for each sequence and head, the long ones first.
//
// A task copies what it reads into float32 arrays whose rows are whole vectors, zeros beyond, so that the products read
// neighbouring elements and need no tails.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "functions.h"
#include "parallel.h"
#include "product.h"

struct Attention {
  const void* qkv;               // (tokens, width) elements: all queries, then all keys, then all values of a token
  const int64_t* longest_first;  // (sequences,)
  const int32_t* cu_seqlens;     // (bounds,), one more than there are sequences
  const int64_t* columns;        // (tokens,)
  const bool* key_mask;          // (tokens,) or null
  const int64_t* seed;           // (1,) or null
  const void* grad;              // (tokens, hidden) elements, or null in the forward
  void* out;                     // (tokens, hidden) elements, or null in the backward
  void* of_qkv;                  // (tokens, width) elements, or null in the forward
  // hidden is heads * head_dim, and width 3 * hidden.
  int64_t tokens, sequences, bounds, width, hidden, heads, head_dim, threshold;
  double scale, rescale;
};

namespace {

constexpr int TILE = TILE_ROWS<4>;
constexpr int BLOCK = 4 * TILE;  // queries whose scores a forward has at hand at once

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// c = a b, where a has whole tiles of rows, and b and c `columns`, whole vectors.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t columns, float* c, int64_t rows, int64_t depth) {
  const auto nothing = [](int64_t) {};
  for (int64_t row = 0; row < rows; row += TILE) {
    const float* left = a + row * a_stride;
    int64_t column = 0;
    for (; column + 4 * WIDTH <= columns; column += 4 * WIDTH) {
      multiply_tile<TILE, 4>(left, a_stride, b + column, columns, c + row * columns + column, columns, depth, nothing);
    }
    const float* right = b + column;
    float* to = c + row * columns + column;
    switch ((columns - column) / WIDTH) {
      case 1:
        multiply_tile<TILE, 1>(left, a_stride, right, columns, to, columns, depth, nothing);
        break;
      case 2:
        multiply_tile<TILE, 2>(left, a_stride, right, columns, to, columns, depth, nothing);
        break;
      case 3:
        multiply_tile<TILE, 3>(left, a_stride, right, columns, to, columns, depth, nothing);
        break;
    }
  }
}

// to[j, i] = from[i, j]
void transpose(const float* from, int64_t rows, int64_t from_stride, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

enum Part { QUERY, KEY, VALUE };

// The tasks of a thread, and the arrays that they use one after another.
template <typename T>
class Task {
 public:
  explicit Task(const Attention& op) : op(op), features(round_up(op.head_dim, WIDTH)) {}

  void run(int64_t its_sequence, int64_t its_head) {
    sequence = its_sequence;
    head = its_head;
    start = op.cu_seqlens[sequence];
    length = op.cu_seqlens[sequence + 1] - start;
    keys = round_up(length, WIDTH);
    factors.resize(keys);
    if (op.grad == nullptr) {
      forward();
    } else {
      backward();
    }
  }

 private:
  using Array = std::vector<float>;

  void forward() {
    load_transposed(KEY, key);
    load(VALUE, 0, length, value);
    scores.resize(BLOCK * keys);
    result.resize(BLOCK * features);
    for (int64_t first = 0; first < length; first += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, length - first), rows = round_up(count, TILE);
      load(QUERY, first, count, query);
      multiply(query.data(), features, key.data(), keys, scores.data(), rows, op.head_dim);
      for (int64_t i = 0; i < count; ++i) {
        float* row = scores.data() + i * keys;
        softmax(row);
        if (draw(first + i)) {
          for (int64_t j = 0; j < length; ++j) row[j] *= factors[j];
        }
      }
      multiply(scores.data(), keys, value.data(), features, result.data(), rows, length);
      store_rows(result, 1.0f, first, count, static_cast<T*>(op.out), op.hidden, 0);
    }
  }

  // With P the probabilities, D the dropout's factors and S the scores: dV = (P D)^T dO, dP = (dO V^T) D,
  // dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
  void backward() {
    const int64_t rows = round_up(length, TILE);
    load(QUERY, 0, length, query);
    load_transposed(KEY, key);
    load_transposed(VALUE, value);
    load_grad();
    scores.resize(rows * keys);
    of_scores.resize(rows * keys);
    multiply(query.data(), features, key.data(), keys, scores.data(), rows, op.head_dim);
    multiply(grad.data(), features, value.data(), keys, of_scores.data(), rows, op.head_dim);
    dropped.assign(rows * keys, 0.0f);
    for (int64_t i = 0; i < length; ++i) backward_row(i);

    turned.assign(rows * rows, 0.0f);
    result.resize(rows * features);
    transpose(dropped.data(), length, keys, length, turned.data(), rows);
    multiply(turned.data(), rows, grad.data(), features, result.data(), rows, length);
    store_rows(result, 1.0f, 0, length, static_cast<T*>(op.of_qkv), op.width, VALUE);

    transpose(of_scores.data(), length, keys, length, turned.data(), rows);
    multiply(turned.data(), rows, query.data(), features, result.data(), rows, length);
    store_rows(result, float(op.scale), 0, length, static_cast<T*>(op.of_qkv), op.width, KEY);

    load(KEY, 0, length, key);
    multiply(of_scores.data(), keys, key.data(), features, result.data(), rows, length);
    store_rows(result, float(op.scale), 0, length, static_cast<T*>(op.of_qkv), op.width, QUERY);
  }

  // From a query's scores and the gradient of its dropped probabilities to those probabilities and the scores' gradient.
  void backward_row(int64_t i) {
    float *row = scores.data() + i * keys, *of_row = of_scores.data() + i * keys, *to = dropped.data() + i * keys;
    softmax(row);
    const bool drops = draw(i);
    float sums[WIDTH] = {}, mean = 0.0f;
    for (int64_t j = 0; j < keys; j += WIDTH) {
      for (int lane = 0; lane < WIDTH; ++lane) {
        const float factor = drops ? factors[j + lane] : 1.0f;
        to[j + lane] = row[j + lane] * factor;
        of_row[j + lane] *= factor;
        sums[lane] += of_row[j + lane] * row[j + lane];
      }
    }
    for (int lane = 0; lane < WIDTH; ++lane) mean += sums[lane];
    for (int64_t j = 0; j < keys; ++j) of_row[j] = row[j] * (of_row[j] - mean);
  }

  const T* part(Part which, int64_t i) const {
    return static_cast<const T*>(op.qkv) + (start + i) * op.width + which * op.hidden + head * op.head_dim;
  }

  // Whole tiles of rows that begin with tokens [first, first + count).
  void load(Part which, int64_t first, int64_t count, Array& to) const {
    to.assign(round_up(count, TILE) * features, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const T* from = part(which, first + i);
      for (int64_t d = 0; d < op.head_dim; ++d) to[i * features + d] = to_float(from[d]);
    }
  }

  void load_transposed(Part which, Array& to) {
    load(which, 0, length, turned);
    to.assign(op.head_dim * keys, 0.0f);
    transpose(turned.data(), length, features, op.head_dim, to.data(), keys);
  }

  void load_grad() {
    grad.assign(round_up(length, TILE) * features, 0.0f);
    for (int64_t i = 0; i < length; ++i) {
      const T* from = static_cast<const T*>(op.grad) + (start + i) * op.hidden + head * op.head_dim;
      for (int64_t d = 0; d < op.head_dim; ++d) grad[i * features + d] = to_float(from[d]);
    }
  }

  void store_rows(const Array& rows, float factor, int64_t first, int64_t count, T* to, int64_t stride, int which) const {
    for (int64_t i = 0; i < count; ++i) {
      T* row = to + (start + first + i) * stride + which * op.hidden + head * op.head_dim;
      for (int64_t d = 0; d < op.head_dim; ++d) from_float(rows[i * features + d] * factor, row[d]);
    }
  }

  // Of the scores times the scale, which comes after the largest is taken off and so costs the fewest digits; in place,
  // over the keys that are kept, zeros where there is none.
  void softmax(float* row) const {
    for (int64_t j = length; j < keys; ++j) row[j] = -INFINITY;
    if (op.key_mask != nullptr) {
      for (int64_t j = 0; j < length; ++j) row[j] = op.key_mask[start + j] ? row[j] : -INFINITY;
    }
    float most[WIDTH], sums[WIDTH] = {};
    for (int i = 0; i < WIDTH; ++i) most[i] = -INFINITY;
    for (int64_t j = 0; j < keys; j += WIDTH) {
      for (int i = 0; i < WIDTH; ++i) most[i] = row[j + i] > most[i] ? row[j + i] : most[i];
    }
    const float scale = float(op.scale);
    float largest = -INFINITY, sum = 0.0f;
    for (int i = 0; i < WIDTH; ++i) largest = most[i] > largest ? most[i] : largest;
    if (largest == -INFINITY) largest = 0.0f;
    for (int64_t j = 0; j < keys; j += WIDTH) {
      for (int i = 0; i < WIDTH; ++i) sums[i] += row[j + i] = exponential((row[j + i] - largest) * scale);
    }
    for (int i = 0; i < WIDTH; ++i) sum += sums[i];
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t j = 0; j < keys; ++j) row[j] *= share;
  }

  // Sets `factors` to what dropout multiplies a query's probabilities with, by the columns that its keys stand in;
  // false where there is no dropout.
  bool draw(int64_t i) {
    if (op.seed == nullptr) return false;
    const uint64_t seed = uint64_t(*op.seed);
    const uint32_t column = uint32_t(op.columns[start + i]);
    int64_t group = -1;
    Words words = {};
    for (int64_t j = 0; j < length; ++j) {
      const int64_t key_column = op.columns[start + j];
      if (key_column / 4 != group) {
        group = key_column / 4;
        words = philox(seed, uint32_t(group), column, uint32_t(sequence), uint32_t(head));
      }
      factors[j] = words.w[key_column % 4] >= uint32_t(op.threshold) ? float(op.rescale) : 0.0f;
    }
    return true;
  }

  const Attention& op;
  const int64_t features;  // head_dim in whole vectors
  int64_t sequence, head, start, length, keys;
  Array query, key, value, grad, scores, of_scores, dropped, turned, result, factors;
};

}  // namespace

extern "C" const char* attention(const Attention* op, int dtype, ParallelFor run) {
  return with_dtype(dtype, [&](auto element) {
    // Tasks differ in size, so whoever is free takes the next one.
    std::atomic<int64_t> next(0);
    const int64_t tasks = op->sequences * op->heads;
    const int64_t mean = tasks == 0 ? 0 : op->tokens / op->sequences;
    return parallel(run, tasks, mean * (mean + op->head_dim), [&](int64_t, int64_t) {
      Task<decltype(element)> task(*op);
      for (int64_t i; (i = next++) < tasks;) task.run(op->longest_first[i / op->heads], i % op->heads);
    });
  });
}

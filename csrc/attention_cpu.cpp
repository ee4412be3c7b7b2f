// The `attention` op on a CPU, forward: a task for each sequence and head, the long ones first.
//
// Keys, values and queries of a task are copied out of qkv into float32 arrays, so that the products read whole vectors
// of neighbouring elements. A block of queries' scores stays in the cache from the first product to the second.
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
  void* out;                     // (tokens, hidden) elements; hidden is heads * head_dim, and width 3 * hidden
  int64_t tokens, sequences, bounds, width, hidden, heads, head_dim, threshold;
  double scale, rescale;
};

namespace {

constexpr int BLOCK = 4 * TILE_ROWS<4>;  // queries whose scores are at hand at once

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// c = a b for operands whose sizes are whole numbers of tiles: `rows` of TILE_ROWS<4>, `columns` of WIDTH.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t columns, float* c, int64_t rows, int64_t depth) {
  constexpr int ROWS = TILE_ROWS<4>;
  const auto nothing = [](int64_t) {};
  for (int64_t row = 0; row < rows; row += ROWS) {
    const float* left = a + row * a_stride;
    int64_t column = 0;
    for (; column + 4 * WIDTH <= columns; column += 4 * WIDTH) {
      multiply_tile<ROWS, 4>(left, a_stride, b + column, columns, c + row * columns + column, columns, depth, nothing);
    }
    const float* right = b + column;
    float* to = c + row * columns + column;
    switch ((columns - column) / WIDTH) {
      case 1:
        multiply_tile<ROWS, 1>(left, a_stride, right, columns, to, columns, depth, nothing);
        break;
      case 2:
        multiply_tile<ROWS, 2>(left, a_stride, right, columns, to, columns, depth, nothing);
        break;
      case 3:
        multiply_tile<ROWS, 3>(left, a_stride, right, columns, to, columns, depth, nothing);
        break;
    }
  }
}

// One sequence and head, and the arrays that its tasks share on a thread.
template <typename T>
class Task {
 public:
  explicit Task(const Attention& op) : op(op), features(round_up(op.head_dim, WIDTH)) {}

  void run(int64_t sequence, int64_t head) {
    this->sequence = sequence;
    this->head = head;
    start = op.cu_seqlens[sequence];
    length = op.cu_seqlens[sequence + 1] - start;
    keys = round_up(length, WIDTH);
    key.assign(op.head_dim * keys, 0.0f);
    value.assign(length * features, 0.0f);
    for (int64_t i = 0; i < length; ++i) {
      const T *k = part(i, 1), *v = part(i, 2);
      for (int64_t d = 0; d < op.head_dim; ++d) key[d * keys + i] = to_float(k[d]);
      for (int64_t d = 0; d < op.head_dim; ++d) value[i * features + d] = to_float(v[d]);
    }
    query.resize(BLOCK * op.head_dim);
    scores.resize(BLOCK * keys);
    result.resize(BLOCK * features);
    for (int64_t first = 0; first < length; first += BLOCK) attend(first, std::min<int64_t>(BLOCK, length - first));
  }

 private:
  const T* part(int64_t i, int64_t which) const {
    return static_cast<const T*>(op.qkv) + (start + i) * op.width + which * op.hidden + head * op.head_dim;
  }

  // The results of `count` queries, of which `first` is the first.
  void attend(int64_t first, int64_t count) {
    const int64_t rows = round_up(count, TILE_ROWS<4>);
    for (int64_t i = 0; i < rows; ++i) {
      const T* q = part(first + std::min(i, count - 1), 0);
      for (int64_t d = 0; d < op.head_dim; ++d) query[i * op.head_dim + d] = to_float(q[d]) * float(op.scale);
    }
    multiply(query.data(), op.head_dim, key.data(), keys, scores.data(), rows, op.head_dim);
    for (int64_t i = 0; i < count; ++i) {
      softmax(scores.data() + i * keys);
      if (op.seed != nullptr) drop_keys(scores.data() + i * keys, op.columns[start + first + i]);
    }
    multiply(scores.data(), keys, value.data(), features, result.data(), rows, length);
    for (int64_t i = 0; i < count; ++i) {
      T* out = static_cast<T*>(op.out) + (start + first + i) * op.hidden + head * op.head_dim;
      for (int64_t d = 0; d < op.head_dim; ++d) from_float(result[i * features + d], out[d]);
    }
  }

  // In place, over the keys that are kept; zeros where there is none.
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
    float largest = -INFINITY, sum = 0.0f;
    for (int i = 0; i < WIDTH; ++i) largest = most[i] > largest ? most[i] : largest;
    if (largest == -INFINITY) largest = 0.0f;
    for (int64_t j = 0; j < keys; j += WIDTH) {
      for (int i = 0; i < WIDTH; ++i) sums[i] += row[j + i] = exponential(row[j + i] - largest);
    }
    for (int i = 0; i < WIDTH; ++i) sum += sums[i];
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t j = 0; j < keys; ++j) row[j] *= share;
  }

  // Dropout of a query's probabilities, by the columns that its keys stand in.
  void drop_keys(float* row, int64_t query_column) const {
    const uint64_t seed = uint64_t(*op.seed);
    int64_t group = -1;
    Words words = {};
    for (int64_t j = 0; j < length; ++j) {
      const int64_t column = op.columns[start + j];
      if (column / 4 != group) {
        group = column / 4;
        words = philox(seed, uint32_t(group), uint32_t(query_column), uint32_t(sequence), uint32_t(head));
      }
      row[j] = words.w[column % 4] >= uint32_t(op.threshold) ? row[j] * float(op.rescale) : 0.0f;
    }
  }

  const Attention& op;
  const int64_t features;  // head_dim in whole vectors
  int64_t sequence, head, start, length, keys;
  std::vector<float> query, key, value, scores, result;  // (BLOCK, head_dim), (head_dim, keys), (length, features), ...
};

}  // namespace

extern "C" const char* attention_forward(const Attention* op, int dtype, ParallelFor run) {
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

// The `attention` op on a CPU, forward and backward: a task is some heads of a sequence, long sequences first.
//
// A task copies its inputs into float32 arrays whose rows are padded to whole vectors and whose row counts are padded
// to whole tiles. So the products read neighbouring elements and need no code for remainders. Results in the padding
// are never read.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "boundary.h"
#include "dropout.h"
#include "functions.h"
#include "ops.h"
#include "product.h"
#include "transpose.h"

namespace erniem_fast {

namespace {

constexpr int TILE = TILE_ROWS<4>;
constexpr int BLOCK = 4 * TILE;      // queries whose scores the forward computes at once
constexpr int DRAWN = 2 * WIDTH;     // elements of a row whose random words are drawn at once
constexpr int64_t CACHED = 3 << 19;  // bytes of q, k and v that fit a core's cache beside a task's arrays

// c = a b, where a has whole tiles of rows, and b and c have `columns` columns, whole vectors; those of c are all that
// it has.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t columns, float* c,
              int64_t rows, int64_t depth) {
  const auto nothing = [](int64_t) {};
  for (int64_t row = 0; row < rows; row += TILE) {
    const float* left = a + row * a_stride;
    int64_t column = 0;
    for (; column + 4 * WIDTH <= columns; column += 4 * WIDTH) {
      multiply_tile<TILE, 4>(left, a_stride, b + column, b_stride, c + row * columns + column, columns, depth, nothing);
    }
    const float* right = b + column;
    float* to = c + row * columns + column;
    switch ((columns - column) / WIDTH) {
      case 1:
        multiply_tile<TILE, 1>(left, a_stride, right, b_stride, to, columns, depth, nothing);
        break;
      case 2:
        multiply_tile<TILE, 2>(left, a_stride, right, b_stride, to, columns, depth, nothing);
        break;
      case 3:
        multiply_tile<TILE, 3>(left, a_stride, right, b_stride, to, columns, depth, nothing);
        break;
    }
  }
}

// Floats aligned so that no vector crosses a boundary between cache lines.
using Array = std::vector<Vector>;

// Memory for `size` floats; grows the array if needed and keeps its values.
float* reserve(Array& array, int64_t size) {
  const size_t vectors = round_up(size, WIDTH) / WIDTH;
  if (array.size() < vectors) array.resize(vectors);
  return reinterpret_cast<float*>(array.data());
}

// Converts a row to float32.
template <typename T>
void convert(const T* from, int64_t size, float* to) {
  if constexpr (std::is_same_v<T, float>) {
    memcpy(to, from, size * sizeof(float));
  } else {
    for (int64_t d = 0; d < size; ++d) to[d] = to_float(from[d]);
  }
}

enum Part { QUERY, KEY, VALUE };

// Indices [first, end) in a sequence.
struct Range {
  int64_t first, end;
};

// The tasks of one thread, one after another, which share their arrays.
template <typename T>
class Task {
 public:
  explicit Task(const Attention& op)
      : op(op), head_dim(op.hidden / op.heads), width(3 * op.hidden), features(round_up(head_dim, WIDTH)) {}

  // Computes heads [first, end) of a sequence.
  void run(int64_t its_sequence, int64_t first, int64_t end) {
    sequence = its_sequence;
    start = op.cu_seqlens[sequence];
    length = op.cu_seqlens[sequence + 1] - start;
    keys = round_up(length, WIDTH);
    if (op.seed != nullptr) survey();
    head = first;
    fetch(end - first);
    for (; head < end; ++head) {
      if (op.grad == nullptr) {
        forward();
      } else {
        backward();
      }
    }
  }

 private:
  void forward() {
    float *left = reserve(query, BLOCK * features), *row = reserve(scores, BLOCK * keys);
    float* out = reserve(result, BLOCK * features);
    const float *right = load_transposed(KEY, key), *values = load(VALUE, 0, length, value);
    for (int64_t first = 0; first < length; first += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, length - first), rows = round_up(count, TILE);
      const Range seen = seen_by(first, count);
      const int64_t depth = seen.end - seen.first, width = round_up(depth, WIDTH);
      load(QUERY, first, count, query);
      multiply(left, features, right + seen.first, keys, width, row, rows, head_dim);
      // Softmax divides by the sum of a row; here the result is divided, because it has fewer elements.
      exponentials(row, first, count, seen, shares);
      for (int64_t i = 0; i < count; ++i) {
        if (const float* factors = draw(first + i)) {
          for (int64_t j = 0; j < depth; ++j) row[i * width + j] *= factors[seen.first + j];
        }
      }
      multiply(row, width, values + seen.first * features, features, features, out, rows, depth);
      for (int64_t i = 0; i < count; ++i) {
        store_row(out + i * features, shares[i], static_cast<T*>(op.out) + (start + first + i) * op.hidden);
      }
    }
  }

  // With P the probabilities, D the dropout's factors and S the scores: dV = (P D)^T dO, dP = (dO V^T) D,
  // dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
  void backward() {
    const int64_t rows = round_up(length, TILE);
    const float *queries = load(QUERY, 0, length, query), *grad_out = load_grad();
    float *p = reserve(scores, rows * keys), *ds = reserve(grad_scores, rows * keys),
          *pd = reserve(dropped, rows * keys);
    multiply(queries, features, load_transposed(KEY, key), keys, keys, p, rows, head_dim);
    multiply(grad_out, features, load_transposed(VALUE, value), keys, keys, ds, rows, head_dim);
    for (int64_t first = 0; first < length; first += BLOCK) {
      const int64_t end = std::min<int64_t>(length, first + BLOCK);
      exponentials(p + first * keys, first, end - first, {0, length}, shares);
      for (int64_t i = first; i < end; ++i) {
        backward_row(i, shares[i - first], p + i * keys, ds + i * keys, pd + i * keys);
      }
    }

    float *across = reserve(turned, rows * keys), *out = reserve(result, rows * features);
    transpose(pd, length, keys, length, across, keys);
    multiply(across, keys, grad_out, features, features, out, rows, length);
    store_gradient(out, 1.0f, VALUE);

    transpose(ds, length, keys, length, across, keys);
    multiply(across, keys, queries, features, features, out, rows, length);
    store_gradient(out, float(op.scale), KEY);

    multiply(ds, keys, load(KEY, 0, length, key), features, features, out, rows, length);
    store_gradient(out, float(op.scale), QUERY);
  }

  // Row i: `row` holds exponentials and becomes probabilities by the factor `share`, `grad_row` holds the gradient of
  // the dropped probabilities and becomes that of the scores, and `to` becomes the dropped probabilities.
  void backward_row(int64_t i, float share, float* row, float* grad_row, float* to) {
    for (int64_t j = 0; j < keys; ++j) row[j] *= share;
    const float* factors = draw(i);
    Vector sums = {};
    for (int64_t j = 0; j < keys; j += WIDTH) {
      const Vector factor = factors ? load_vector(factors + j) : Vector{} + 1.0f;
      const Vector p = load_vector(row + j), grad = load_vector(grad_row + j) * factor, dropped = p * factor;
      memcpy(to + j, &dropped, sizeof dropped);
      memcpy(grad_row + j, &grad, sizeof grad);
      sums += grad * p;
    }
    const float mean = total(sums);
    for (int64_t j = 0; j < keys; ++j) grad_row[j] = row[j] * (grad_row[j] - mean);
  }

  const T* part(Part which, int64_t i) const {
    return static_cast<const T*>(op.qkv) + (start + i) * width + which * op.hidden + head * head_dim;
  }

  // Brings the rows of all the task's heads into the cache. Each head reads short pieces that lie far apart, which the
  // processor would not prefetch.
  void fetch(int64_t heads) const {
    const int64_t bytes = heads * head_dim * sizeof(T);
    if (3 * length * bytes > CACHED) return;
    for (int64_t i = 0; i < length; ++i) {
      for (const Part which : {QUERY, KEY, VALUE}) {
        const volatile char* row = reinterpret_cast<const volatile char*>(part(which, i));
        for (int64_t byte = 0; byte < bytes; byte += 64) row[byte];
      }
    }
  }

  // Copies tokens [first, first + count); returns the first row of memory for whole tiles.
  const float* load(Part which, int64_t first, int64_t count, Array& to) const {
    float* rows = reserve(to, round_up(count, TILE) * features);
    for (int64_t i = 0; i < count; ++i) convert(part(which, first + i), head_dim, rows + i * features);
    return rows;
  }

  const float* load_transposed(Part which, Array& to) {
    float* columns = reserve(to, head_dim * keys);
    if constexpr (std::is_same_v<T, float>) {
      transpose(part(which, 0), length, width, head_dim, columns, keys);
    } else {
      transpose(load(which, 0, length, turned), length, features, head_dim, columns, keys);
    }
    return columns;
  }

  const float* load_grad() {
    float* rows = reserve(grad, round_up(length, TILE) * features);
    const T* from = static_cast<const T*>(op.grad) + start * op.hidden + head * head_dim;
    for (int64_t i = 0; i < length; ++i) convert(from + i * op.hidden, head_dim, rows + i * features);
    return rows;
  }

  // Writes the head's part of `to`, a token's row.
  void store_row(const float* row, float factor, T* to) const {
    for (int64_t d = 0; d < head_dim; ++d) from_float(row[d] * factor, to[head * head_dim + d]);
  }

  void store_gradient(const float* rows, float factor, Part which) const {
    T* to = static_cast<T*>(op.grad_qkv) + start * width + which * op.hidden;
    for (int64_t i = 0; i < length; ++i) store_row(rows + i * features, factor, to + i * width);
  }

  // Finds the range of the keys' columns, and whether they follow one another.
  void survey() {
    const int64_t* columns = op.columns + start;
    const auto [least, most] = std::minmax_element(columns, columns + length);
    first_column = length == 0 ? 0 : *least / 4 * 4;
    last_column = length == 0 ? -1 : *most;
    neighbours = true;
    for (int64_t j = 0; j < length; ++j) neighbours = neighbours && columns[j] == columns[0] + j;
  }

  // The keys that query i sees; they may be none.
  Range range_of(int64_t i) const {
    if (op.key_ranges == nullptr) return {0, length};
    const int32_t* range = op.key_ranges + 2 * (start + i);
    return {std::max<int64_t>(0, range[0]), std::min<int64_t>(length, range[1])};
  }

  // A range that holds the keys that `count` queries see, from `first` on; it starts where a vector does.
  Range seen_by(int64_t first, int64_t count) const {
    if (op.key_ranges == nullptr) return {0, length};
    Range seen = {length, 0};
    for (int64_t i = first; i < first + count; ++i) {
      const Range range = range_of(i);
      if (range.first >= range.end) continue;
      seen = {std::min(seen.first, range.first), std::max(seen.end, range.end)};
    }
    return {std::min(seen.first / WIDTH * WIDTH, seen.end), seen.end};
  }

  // Turns `count` rows of scores, at most BLOCK, into e^(scale (score - largest)), with the key bias in the scores and
  // zeros for keys that a query does not see and in the padding; writes the reciprocals of their sums to `to`, or 0 if
  // there is no key. The rows are those of queries from `first` on, with the keys `seen`. Scaling after the largest is
  // subtracted loses the fewest digits. Each step is taken for all rows before the next one: a row alone would have to
  // wait for its largest score, and then for its sum.
  void exponentials(float* rows, int64_t first, int64_t count, Range seen, float* to) const {
    const float scale = float(op.scale), unscale = 1.0f / scale;
    const int64_t depth = seen.end - seen.first, width = round_up(depth, WIDTH);
    Vector sums[BLOCK];
    for (int64_t i = 0; i < count; ++i) {
      float* row = rows + i * width;
      if (op.key_bias != nullptr) {
        for (int64_t j = 0; j < depth; ++j) row[j] += op.key_bias[start + seen.first + j] * unscale;
      }
      const Range range = range_of(first + i);
      const int64_t begin = std::min(std::max<int64_t>(0, range.first - seen.first), depth);
      const int64_t end = std::max(begin, std::min(range.end - seen.first, depth));
      for (int64_t j = 0; j < begin; ++j) row[j] = -INFINITY;
      for (int64_t j = end; j < width; ++j) row[j] = -INFINITY;
      // With an array for the lanes, the compiler takes this loop apart into single numbers.
      Vector most = Vector{} - INFINITY;
      for (int64_t j = 0; j < width; j += WIDTH) {
        const Vector scores = load_vector(row + j);
        most = scores > most ? scores : most;
      }
      const float found = largest(most);
      to[i] = found == -INFINITY ? 0.0f : found;
    }
    for (int64_t i = 0; i < count; ++i) {
      float *row = rows + i * width, lanes[WIDTH] = {};
      for (int64_t j = 0; j < width; j += WIDTH) {
        for (int k = 0; k < WIDTH; ++k) lanes[k] += row[j + k] = exponential((row[j + k] - to[i]) * scale);
      }
      sums[i] = load_vector(lanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float sum = total(sums[i]);
      to[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
  }

  // The factors of dropout for a query's probabilities, 0 or `rescale` for each key; null without dropout.
  const float* draw(int64_t i) {
    if (op.seed == nullptr) return nullptr;
    const int64_t* columns = op.columns + start;
    const uint64_t seed = uint64_t(*op.seed);
    const uint32_t query_column = uint32_t(columns[i]), threshold = uint32_t(op.threshold);
    const float rescale = float(op.rescale);
    float* all = reserve(drawn, last_column + 1 - first_column + DRAWN + WIDTH);
    for (int64_t column = first_column; column <= last_column; column += DRAWN) {
      const auto words =
          erniem_fast::draw<DRAWN>(seed, uint32_t(column / 4), query_column, uint32_t(sequence), uint32_t(head));
      float* to = all + column - first_column;
      for (int k = 0; k < DRAWN; ++k) to[k] = words.w[k] >= threshold ? rescale : 0.0f;
    }
    if (neighbours) return all + columns[0] - first_column;
    float* picked = reserve(factors, keys);
    for (int64_t j = 0; j < length; ++j) picked[j] = all[columns[j] - first_column];
    return picked;
  }

  const Attention& op;
  const int64_t head_dim, width;
  const int64_t features;  // head_dim rounded up to whole vectors
  int64_t sequence, head, start, length, keys;
  int64_t first_column, last_column;  // of the keys; the first is rounded down to a group of the generator
  bool neighbours;                    // whether each key's column follows the previous one's
  float shares[BLOCK];
  Array query, key, value, grad, scores, grad_scores, dropped, turned, result, drawn, factors;
};

// Whether the bounds cut all tokens into sequences. They are unchecked inside a graph, and other bounds would make a
// task write outside of the result.
bool cut_all_tokens(const Attention& op) {
  const int32_t *begin = op.cu_seqlens, *end = begin + op.sequences + 1;
  return *begin == 0 && end[-1] == op.tokens && std::is_sorted(begin, end);
}

void attend(const Attention& op, int dtype, ParallelFor run) {
  if (op.heads < 1 || op.hidden % op.heads != 0) throw std::invalid_argument("heads must divide hidden");
  if (!cut_all_tokens(op)) {
    throw std::invalid_argument("cu_seqlens must rise from 0 to the number of tokens");
  }
  with_dtype(dtype, [&](auto element) {
    // Tasks differ in size, so each thread takes the next one when it is free.
    std::atomic<int64_t> next(0);
    const int64_t enough =
        op.sequences * op.heads / (4 * op.threads);  // heads per task that still leave four tasks per thread
    const int64_t heads = std::min(std::max<int64_t>(1, enough), op.heads);
    const int64_t groups = (op.heads + heads - 1) / heads, tasks = op.sequences * groups;
    const int64_t mean = tasks == 0 ? 0 : op.tokens / op.sequences;
    parallel(run, tasks, heads * mean * (mean + op.hidden / op.heads), [&](int64_t, int64_t) {
      Task<decltype(element)> task(op);
      for (int64_t i; (i = next++) < tasks;) {
        const int64_t first = i % groups * heads;
        task.run(op.longest_first[i / groups], first, std::min(first + heads, op.heads));
      }
    });
  });
}

}  // namespace

extern "C" const char* attention_forward(const Attention* op, int dtype, ParallelFor run) {
  return error_of([&] { attend(*op, dtype, run); });
}

extern "C" const char* attention_backward(const Attention* op, int dtype, ParallelFor run) {
  return error_of([&] { attend(*op, dtype, run); });
}

}  // namespace erniem_fast

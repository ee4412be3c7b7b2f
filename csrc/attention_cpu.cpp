// The `attention` op on a CPU, forward and backward: a task is some heads of a sequence, long sequences first.
//
// A task copies its inputs into float32 arrays whose rows are padded to whole vectors and whose row counts are padded
// to whole tiles. So the products read neighbouring elements and need no code for remainders. Results in the padding
// are never read. If the processor can multiply bfloat16, `BFloat16Task` computes the forward in that dtype.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <type_traits>

#include "attention_bfloat16.h"
#include "attention_task.h"
#include "boundary.h"
#include "product.h"
#include "transpose.h"

namespace erniem_fast {

namespace {

constexpr int TILE = TILE_ROWS<4>;
constexpr int BLOCK = 4 * TILE;  // queries whose scores the forward computes at once

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

// Converts a row to float32.
template <typename T>
void convert(const T* from, int64_t size, float* to) {
  if constexpr (std::is_same_v<T, float>) {
    memcpy(to, from, size * sizeof(float));
  } else {
    for (int64_t d = 0; d < size; ++d) to[d] = to_float(from[d]);
  }
}

// The tasks of one thread, one after another, which share their arrays.
template <typename T>
class Task : AttentionTask<T> {
 public:
  explicit Task(const Attention& op) : AttentionTask<T>(op), features(round_up(head_dim, WIDTH)) {}

  // Computes heads [first, end) of a sequence.
  void run(int64_t its_sequence, int64_t first, int64_t end) {
    choose(its_sequence, first, end);
    keys = round_up(length, WIDTH);
    for (head = first; head < end; ++head) {
      if (op.grad == nullptr) {
        forward();
      } else {
        backward();
      }
    }
  }

 private:
  using Base = AttentionTask<T>;
  using Base::choose, Base::draw, Base::exponentials, Base::part, Base::seen_by, Base::shares;
  using Base::op, Base::head, Base::head_dim, Base::length, Base::start, Base::width;

  void forward() {
    float *left = reserve(query, BLOCK * features), *row = reserve(scores, BLOCK * keys);
    float* out = reserve(result, BLOCK * features);
    const float *right = load_transposed(KEY, key), *values = load(VALUE, 0, length, value);
    for (int64_t first = 0; first < length; first += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, length - first), rows = round_up(count, TILE);
      const KeyRange seen = seen_by(first, count, WIDTH);
      const int64_t depth = seen.end - seen.first, width = round_up(depth, WIDTH);
      load(QUERY, first, count, query);
      multiply(left, features, right + seen.first, keys, width, row, rows, head_dim);
      // Softmax divides by the sum of a row; here the result is divided, because it has fewer elements.
      exponentials({row, BLOCK, width, 1}, first, count, seen);
      for (int64_t i = 0; i < count; ++i) {
        if (const float* factors = draw(first + i)) {
          for (int64_t j = 0; j < depth; ++j) row[i * width + j] *= factors[seen.first + j];
        }
      }
      multiply(row, width, values + seen.first * features, features, features, out, rows, depth);
      for (int64_t i = 0; i < count; ++i) {
        store_row(out + i * features, shares[i], this->result_of(first + i));
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
      exponentials({p + first * keys, BLOCK, keys, 1}, first, end - first, {0, length});
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

  void store_row(const float* row, float factor, T* to) const {
    for (int64_t d = 0; d < head_dim; ++d) from_float(row[d] * factor, to[d]);
  }

  void store_gradient(const float* rows, float factor, Part which) const {
    T* to = static_cast<T*>(op.grad_qkv) + start * width + which * op.hidden + head * head_dim;
    for (int64_t i = 0; i < length; ++i) store_row(rows + i * features, factor, to + i * width);
  }

  const int64_t features;  // head_dim rounded up to whole vectors
  int64_t keys;            // the sequence's length, rounded up to whole vectors
  Array query, key, value, grad, scores, grad_scores, dropped, turned, result;
};

// Whether the bounds cut all tokens into sequences. They are unchecked inside a graph, and other bounds would make a
// task write outside of the result.
bool cut_all_tokens(const Attention& op) {
  const int32_t *begin = op.cu_seqlens, *end = begin + op.sequences + 1;
  return *begin == 0 && end[-1] == op.tokens && std::is_sorted(begin, end);
}

// Runs all tasks by what `make` returns, one object for each thread.
template <typename Make>
void for_tasks(const Attention& op, ParallelFor run, const Make& make) {
  // Tasks differ in size, so each thread takes the next one when it is free.
  std::atomic<int64_t> next(0);
  const int64_t enough =
      op.sequences * op.heads / (4 * op.threads);  // heads per task that still leave four tasks per thread
  const int64_t heads = std::min(std::max<int64_t>(1, enough), op.heads);
  const int64_t groups = (op.heads + heads - 1) / heads, tasks = op.sequences * groups;
  const int64_t mean = tasks == 0 ? 0 : op.tokens / op.sequences;
  parallel(run, tasks, heads * mean * (mean + op.hidden / op.heads), [&](int64_t, int64_t) {
    auto task = make();
    for (int64_t i; (i = next++) < tasks;) {
      const int64_t first = i % groups * heads;
      task.run(op.longest_first[i / groups], first, std::min(first + heads, op.heads));
    }
  });
}

void attend(const Attention& op, int dtype, ParallelFor run) {
  if (op.heads < 1 || op.hidden % op.heads != 0) throw std::invalid_argument("heads must divide hidden");
  if (!cut_all_tokens(op)) {
    throw std::invalid_argument("cu_seqlens must rise from 0 to the number of tokens");
  }
  const FloatTile tile = dtype == BFLOAT16 && op.grad == nullptr ? bfloat16_tile() : FloatTile();
  if (tile.multiply != nullptr && op.hidden / op.heads % 2 == 0) {
    for_tasks(op, run, [&] { return BFloat16Task(op, tile); });
    return;
  }
  with_dtype(dtype, [&](auto element) { for_tasks(op, run, [&] { return Task<decltype(element)>(op); }); });
}

}  // namespace

extern "C" const char* attention_forward(const Attention* op, int dtype, ParallelFor run) {
  return error_of([&] { attend(*op, dtype, run); });
}

extern "C" const char* attention_backward(const Attention* op, int dtype, ParallelFor run) {
  return error_of([&] { attend(*op, dtype, run); });
}

}  // namespace erniem_fast

// What the tasks of `attention` on a CPU share, whatever they multiply in. A task is some heads of a sequence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dropout.h"
#include "functions.h"
#include "ops.h"
#include "product.h"

namespace erniem_fast {

// Floats aligned so that no vector crosses a boundary between cache lines.
using Array = std::vector<Vector>;

// Memory for `size` floats; grows the array if needed and keeps its values.
inline float* reserve(Array& array, int64_t size) {
  const size_t vectors = round_up(size, WIDTH) / WIDTH;
  if (array.size() < vectors) array.resize(vectors);
  return reinterpret_cast<float*>(array.data());
}

enum Part { QUERY, KEY, VALUE };

// Keys [first, end) of a sequence.
struct KeyRange {
  int64_t first, end;
};

// Scores of up to `rows` queries, in chunks of `width` keys, which are whole vectors: [chunks][rows][width].
struct Scores {
  float* memory;
  int64_t rows, width, chunks;
  float* row(int64_t i, int64_t chunk) const { return memory + (chunk * rows + i) * width; }
};

constexpr int64_t MOST_QUERIES = 64;  // whose scores a forward computes at once
constexpr int64_t CACHED = 3 << 19;   // bytes of q, k and v that fit a core's cache beside a task's arrays

template <typename T>
class AttentionTask {
 protected:
  explicit AttentionTask(const Attention& op) : op(op), head_dim(op.hidden / op.heads), width(3 * op.hidden) {}

  // Prepares for heads [first, end) of a sequence.
  void choose(int64_t its_sequence, int64_t first, int64_t end) {
    sequence = its_sequence;
    start = op.cu_seqlens[sequence];
    length = op.cu_seqlens[sequence + 1] - start;
    if (op.seed != nullptr) survey();
    head = first;
    fetch(end - first);
  }

  const T* part(Part which, int64_t i) const {
    return static_cast<const T*>(op.qkv) + (start + i) * width + which * op.hidden + head * head_dim;
  }

  // Where the head's result for query i belongs.
  T* result_of(int64_t i) const { return static_cast<T*>(op.out) + (start + i) * op.hidden + head * head_dim; }

  // The keys that query i sees; they may be none.
  KeyRange range_of(int64_t i) const {
    if (op.key_ranges == nullptr) return {0, length};
    const int32_t* range = op.key_ranges + 2 * (start + i);
    return {std::max<int64_t>(0, range[0]), std::min<int64_t>(length, range[1])};
  }

  // A range that holds the keys that `count` queries see, from `first` on; it starts at a multiple of `unit`.
  KeyRange seen_by(int64_t first, int64_t count, int64_t unit) const {
    if (op.key_ranges == nullptr) return {0, length};
    KeyRange seen = {length, 0};
    for (int64_t i = first; i < first + count; ++i) {
      const KeyRange range = range_of(i);
      if (range.first >= range.end) continue;
      seen = {std::min(seen.first, range.first), std::max(seen.end, range.end)};
    }
    return {std::min(seen.first / unit * unit, seen.end), seen.end};
  }

  // Turns the scores of `count` queries, from `first` on, and of the keys `seen` into e^(scale (score - largest)), with
  // the key bias in the scores and zeros for keys that a query does not see and in the padding; writes the reciprocals
  // of their sums to `shares`, or 0 if there is no key. Scaling after the largest is subtracted loses the fewest
  // digits. Each step is taken for all rows before the next one: a row alone would have to wait for its largest score,
  // and then for its sum.
  void exponentials(const Scores& scores, int64_t first, int64_t count, KeyRange seen) {
    const float scale = float(op.scale);
    Vector sums[MOST_QUERIES];
    for (int64_t i = 0; i < count; ++i) {
      const float most = complete_scores(scores, i, seen, range_of(first + i));
      shares[i] = most == -INFINITY ? 0.0f : most;
    }
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = Vector();
      for (int64_t chunk = 0; chunk < scores.chunks; ++chunk) {
        float* row = scores.row(i, chunk);
        for (int64_t j = 0; j < scores.width; j += WIDTH) {
          const Vector each = exponential((load_vector(row + j) - shares[i]) * scale);
          memcpy(row + j, &each, sizeof each);
          sums[i] += each;
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float sum = total(sums[i]);
      shares[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
  }

  // The factors of dropout for a query's probabilities, 0 or `rescale` for each key; null without dropout.
  const float* draw(int64_t i) {
    if (op.seed == nullptr) return nullptr;
    constexpr int DRAWN = 2 * WIDTH;  // elements of a row whose random words are drawn at once
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
    float* picked = reserve(factors, round_up(length, WIDTH));
    for (int64_t j = 0; j < length; ++j) picked[j] = all[columns[j] - first_column];
    return picked;
  }

  const Attention& op;
  const int64_t head_dim, width;
  int64_t sequence, head, start, length;
  float shares[MOST_QUERIES];

 private:
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

  // Adds the key bias to row i, and sets scores outside of `range` to -inf; returns the largest score.
  float complete_scores(const Scores& scores, int64_t i, KeyRange seen, KeyRange range) const {
    const float unscale = 1.0f / float(op.scale);
    // With an array for the lanes, the compiler takes the loop below apart into single numbers.
    Vector most = Vector{} - INFINITY;
    for (int64_t chunk = 0; chunk < scores.chunks; ++chunk) {
      float* row = scores.row(i, chunk);
      const int64_t key = seen.first + chunk * scores.width;
      const int64_t present = std::min(scores.width, seen.end - key);
      if (op.key_bias != nullptr) {
        for (int64_t j = 0; j < present; ++j) row[j] += op.key_bias[start + key + j] * unscale;
      }
      const int64_t begin = std::min(std::max<int64_t>(0, range.first - key), present);
      const int64_t end = std::max(begin, std::min(range.end - key, present));
      for (int64_t j = 0; j < begin; ++j) row[j] = -INFINITY;
      for (int64_t j = end; j < scores.width; ++j) row[j] = -INFINITY;
      for (int64_t j = 0; j < scores.width; j += WIDTH) {
        const Vector each = load_vector(row + j);
        most = each > most ? each : most;
      }
    }
    return largest(most);
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

  int64_t first_column, last_column;  // of the keys; the first is rounded down to a group of the generator
  bool neighbours;                    // whether each key's column follows the previous one's
  Array drawn, factors;
};

}  // namespace erniem_fast

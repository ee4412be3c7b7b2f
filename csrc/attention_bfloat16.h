// The forward of `attention` on a CPU with products of bfloat16: scores and sums are in float32, and exponentials are
// rounded to bfloat16 before they multiply the values.
#pragma once

#include "attention_task.h"
#include "packed.h"
#include "packed_tile.h"
#include "transpose.h"

namespace erniem_fast {

// The tasks of one thread, one after another, which share their arrays. The head dimension must be even: an instruction
// multiplies two neighbouring numbers.
class BFloat16Task : AttentionTask<BFloat16> {
 public:
  BFloat16Task(const Attention& op, const FloatTile& tile) : AttentionTask<BFloat16>(op), tile(tile) {}

  // Computes heads [first, end) of a sequence.
  void run(int64_t its_sequence, int64_t first, int64_t end) {
    choose(its_sequence, first, end);
    chunks = round_up(length, COLUMNS) / COLUMNS;
    for (head = first; head < end; ++head) forward();
  }

 private:
  static constexpr int64_t BLOCK = COLUMNS * GROUP;  // bytes of a block of one group
  static constexpr int64_t PAIRS = COLUMNS / 2;      // groups of the keys of a chunk

  void forward() {
    const uint8_t *keys = pack_keys(), *values = pack_values();
    const int64_t groups = head_dim / 2, columns = round_up(head_dim, COLUMNS), most = tile.most_rows;
    float* memory = reserve(scores, most * chunks * COLUMNS);
    for (int64_t first = 0; first < length; first += most) {
      const int64_t count = std::min(most, length - first);
      const KeyRange seen = seen_by(first, count, COLUMNS);
      const int64_t chunk = seen.first / COLUMNS, depth = round_up(seen.end - seen.first, COLUMNS);
      const Scores found = {memory, most, COLUMNS, depth / COLUMNS};
      for (int64_t i = 0; i < found.chunks; ++i) {
        multiply(part(QUERY, first), width, count, keys + (chunk + i) * groups * BLOCK, groups, found.row(0, i));
      }
      exponentials(found, first, count, seen);
      const BFloat16* p = round_exponentials(found, first, count, seen);
      for (int64_t column = 0; column < columns; column += COLUMNS) {
        const uint8_t* block = values + (column * chunks / COLUMNS + chunk) * PAIRS * BLOCK;
        multiply(p, depth, count, block, depth / 2, reserve(result, most * COLUMNS));
        store(first, count, column);
      }
    }
  }

  // The products of `count` rows, `stride` numbers apart, with a block; `to` has rows of COLUMNS sums.
  void multiply(const BFloat16* rows, int64_t stride, int64_t count, const uint8_t* block, int64_t groups,
                float* to) const {
    tile.multiply(count, reinterpret_cast<const uint8_t*>(rows), stride * sizeof(BFloat16), block, block, groups, to);
  }

  // Keys as a weight, a chunk after another: [chunks][groups][COLUMNS][2]. What the memory holds for keys beyond the
  // sequence does not matter, because `exponentials` replaces their scores.
  const uint8_t* pack_keys() {
    const int64_t groups = head_dim / 2;
    float* to = reserve(key, chunks * groups * COLUMNS);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * COLUMNS, count = std::min<int64_t>(COLUMNS, length - first);
      float* block = to + chunk * groups * COLUMNS;
      transpose(reinterpret_cast<const float*>(part(KEY, first)), count, width / 2, groups, block, COLUMNS);
    }
    return reinterpret_cast<const uint8_t*>(to);
  }

  // Values as a weight, whose groups are neighbouring keys: [features / COLUMNS][keys / 2][COLUMNS][2], with zeros
  // beyond the sequence: 0 times NaN would be NaN.
  const uint8_t* pack_values() {
    const int64_t pairs = chunks * PAIRS;
    float* to = reserve(value, round_up(head_dim, COLUMNS) * pairs);
    for (int64_t column = 0; column < head_dim; column += COLUMNS) {
      const int64_t count = std::min<int64_t>(COLUMNS, head_dim - column);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        uint16_t both[2][COLUMNS] = {};
        for (int64_t i = 0; i < 2 && 2 * pair + i < length; ++i) {
          memcpy(both[i], part(VALUE, 2 * pair + i) + column, count * sizeof(BFloat16));
        }
        uint32_t groups[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) groups[j] = both[0][j] | uint32_t(both[1][j]) << 16;
        memcpy(to + (column * pairs / COLUMNS + pair) * COLUMNS, groups, sizeof groups);
      }
    }
    return reinterpret_cast<const uint8_t*>(to);
  }

  // Exponentials with dropout, in bfloat16, row by row: [count][chunks of the keys seen][COLUMNS].
  const BFloat16* round_exponentials(const Scores& from, int64_t first, int64_t count, KeyRange seen) {
    const int64_t depth = from.chunks * COLUMNS;
    BFloat16* all = reinterpret_cast<BFloat16*>(reserve(rounded, count * depth / 2));
    for (int64_t i = 0; i < count; ++i) {
      const float* factors = draw(first + i);
      for (int64_t chunk = 0; chunk < from.chunks; ++chunk) {
        float* row = from.row(i, chunk);
        if (factors != nullptr) {
          const int64_t key = seen.first + chunk * COLUMNS, present = std::min<int64_t>(COLUMNS, seen.end - key);
          for (int64_t j = 0; j < present; ++j) row[j] *= factors[key + j];
        }
        BFloat16* to = all + i * depth + chunk * COLUMNS;
        for (int j = 0; j < COLUMNS; ++j) from_float(row[j], to[j]);
      }
    }
    return all;
  }

  // Divides sums by those of the exponentials: features from `column` on of queries from `first` on.
  void store(int64_t first, int64_t count, int64_t column) const {
    const float* sums = reinterpret_cast<const float*>(result.data());
    const int64_t present = std::min<int64_t>(COLUMNS, head_dim - column);
    for (int64_t i = 0; i < count; ++i) {
      BFloat16* to = result_of(first + i) + column;
      for (int64_t j = 0; j < present; ++j) from_float(sums[i * COLUMNS + j] * shares[i], to[j]);
    }
  }

  const FloatTile tile;
  int64_t chunks;  // of COLUMNS keys
  Array key, value, scores, rounded, result;
};

}  // namespace erniem_fast

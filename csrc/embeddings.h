// The row arithmetic of the `embeddings` op, one source for host and device.
#pragma once

#include <type_traits>

#include "dropout.h"

namespace erniem_fast {

// ---- The arguments from Python: addresses of contiguous tensors, then sizes, then factors. The tables of
// erniem_fast/native/embeddings.py have the same fields in the same order. "Elements" have the dtype of the call.

// There is no dropout if `seed` is null. An element is dropped if its word of the generator is below `threshold`, which
// is at most 2^32 - 1; p = 1 would need 2^32, so there `rescale` = 0 drops the rest.

struct EmbeddingsForward {
  const int64_t* ids;           // (tokens,)
  const int64_t* positions;     // (tokens,)
  const void* word_table;       // (words, hidden) elements, or narrower numbers: see embeddings_cpu.cpp
  const float* word_scale;      // (words,), factors of the rows of int8, or null
  const void* position_table;   // (max_positions, hidden) elements
  const float* weight;          // (hidden,)
  const float* norm_bias;       // (hidden,)
  const int64_t* columns;       // (tokens,) or null
  const int64_t* sequence_ids;  // (tokens,) or null
  const int64_t* seed;          // (1,) or null
  void* out;                    // (tokens, hidden) elements
  void* z;                      // (tokens, hidden) elements, the layer norm's input for the backward, or null
  int64_t tokens, words, max_positions, hidden, threshold;
  double eps, rescale;
};

struct EmbeddingsBackward {
  const void* grad;             // (tokens, hidden) elements
  const void* z;                // (tokens, hidden) elements
  const float* weight;          // (hidden,)
  const int64_t* columns;       // (tokens,) or null
  const int64_t* sequence_ids;  // (tokens,) or null
  const int64_t* seed;          // (1,) or null
  void* grad_z;                 // (tokens, hidden) elements
  float* grad_norm;             // (chunks, 2, hidden), each chunk's share of the gradients of weight and norm_bias
  int64_t tokens, tokens_per_chunk, hidden, threshold;
  double eps, rescale;
};

// Sums the rows of a gradient that belong to the same table row. Tokens come in the order of their table rows, and
// those of one table row are a run. A frequent word makes a long run, so the order is cut into chunks of tokens: one
// group of lanes sums the runs of a chunk, and stores the sum of a run that reaches into other chunks to `partials`;
// another one adds such sums up. Chunks are the same everywhere, so the sums are deterministic, and they need no
// atomics.
struct EmbeddingsScatter {
  const void* rows;      // (tokens, hidden) elements
  const int64_t* index;  // (tokens,), the table row of each token
  const int64_t* order;  // (tokens,), tokens in ascending order of their table rows
  float* partials;       // (chunks, 2, hidden): of a run from a chunk's first token on, and of a later one
  void* table;           // (table_rows, hidden) elements, zeros
  int64_t tokens, tokens_per_chunk, table_rows, hidden, padding_idx;
};

// Zeroes the rows of the padding's tokens.
struct EmbeddingsClear {
  const int64_t* ids;  // (tokens,)
  void* rows;          // (tokens, hidden) elements
  int64_t tokens, hidden, padding_idx;
};

// ---- Rows

template <typename T>
HOST_DEVICE const T* table_row(const void* table, int64_t row, int64_t rows, int64_t hidden) {
  return row < 0 || row >= rows ? nullptr : static_cast<const T*>(table) + row * hidden;
}

// out[token] = dropout(LN(word_table[id] + position_table[position])), where the word table holds `W`. A token whose id
// or position is outside of its table gets NaN, so that nothing is read outside and the error shows. `row` is scratch.
template <typename T, typename W = T, typename Lanes, typename Row>
HOST_DEVICE void embeddings_forward_row(const Lanes& lanes, const EmbeddingsForward& op, int64_t token, Row& row) {
  constexpr int N = Lanes::piece;
  const W* word = table_row<W>(op.word_table, op.ids[token], op.words, op.hidden);
  const T* position = table_row<T>(op.position_table, op.positions[token], op.max_positions, op.hidden);
  const bool found = word != nullptr && position != nullptr;
  T* z = op.z == nullptr ? nullptr : static_cast<T*>(op.z) + token * op.hidden;
  T* out = static_cast<T*>(op.out) + token * op.hidden;

  // All of the row is loaded before anything is stored, so that its loads are in flight together.
  if (found) {
    for_pieces(lanes, op.hidden, [&](int piece, auto count) {
      Piece<N> sum = load<Lanes>(word + piece * N, count);
      const Piece<N> other = load<Lanes>(position + piece * N, count);
      if constexpr (std::is_same_v<W, int8_t>) {
        for (int i = 0; i < N; ++i) sum.x[i] *= op.word_scale[op.ids[token]];
      }
      for (int i = 0; i < N; ++i) sum.x[i] += other.x[i];
      row[piece] = sum;
    });
  } else {
    for_pieces(lanes, op.hidden, [&](int piece, auto) {
      for (int i = 0; i < N; ++i) row[piece].x[i] = NAN;
    });
  }
  if (z != nullptr) {
    for_pieces(lanes, op.hidden, [&](int piece, auto count) { store<Lanes>(z + piece * N, row[piece], count); });
  }
  const float rstd = centre(lanes, op.hidden, op.eps, row);
  for_pieces(lanes, op.hidden, [&](int piece, auto count) {
    const Piece<N> weight = load<Lanes>(op.weight + piece * N, count);
    const Piece<N> norm_bias = load<Lanes>(op.norm_bias + piece * N, count);
    Piece<N> y;
    for (int i = 0; i < N; ++i) y.x[i] = row[piece].x[i] * rstd * weight.x[i] + norm_bias.x[i];
    drop(op, token, piece, y);
    store<Lanes>(out + piece * N, y, count);
  });
}

// The gradient of a token's z; adds the token's share to the gradients of weight and norm_bias. `row` and `grad_y` are
// scratch.
template <typename T, typename Lanes, typename Row>
HOST_DEVICE void embeddings_backward_row(const Lanes& lanes, const EmbeddingsBackward& op, int64_t token, Row& row,
                                         Row& grad_y, Row& grad_weight, Row& grad_norm_bias) {
  constexpr int N = Lanes::piece;
  const T* z = static_cast<const T*>(op.z) + token * op.hidden;
  const T* grad = static_cast<const T*>(op.grad) + token * op.hidden;

  for_pieces(lanes, op.hidden, [&](int piece, auto count) {
    row[piece] = load<Lanes>(z + piece * N, count);
    grad_y[piece] = load<Lanes>(grad + piece * N, count);
    drop(op, token, piece, grad_y[piece]);
  });
  layer_norm_backward(lanes, op.hidden, op.weight, op.eps, row, grad_y, grad_weight, grad_norm_bias);
  for_pieces(lanes, op.hidden, [&](int piece, auto count) {
    store<Lanes>(static_cast<T*>(op.grad_z) + token * op.hidden + piece * N, grad_y[piece], count);
  });
}

// The backward of a chunk's tokens, one after another. The four rows are scratch.
template <typename T, typename Lanes, typename Row>
HOST_DEVICE void embeddings_backward_chunk(const Lanes& lanes, const EmbeddingsBackward& op, int64_t chunk, Row& row,
                                           Row& grad_y, Row& grad_weight, Row& grad_norm_bias) {
  constexpr int N = Lanes::piece;
  for_pieces(lanes, op.hidden, [&](int piece, auto) { grad_weight[piece] = grad_norm_bias[piece] = {}; });

  const int64_t begin = chunk * op.tokens_per_chunk, end = begin + op.tokens_per_chunk;
  for (int64_t token = begin; token < end && token < op.tokens; ++token) {
    embeddings_backward_row<T>(lanes, op, token, row, grad_y, grad_weight, grad_norm_bias);
  }
  float* grad_norm = op.grad_norm + chunk * 2 * op.hidden;
  for_pieces(lanes, op.hidden, [&](int piece, auto count) {
    store<Lanes>(grad_norm + piece * N, grad_weight[piece], count);
    store<Lanes>(grad_norm + op.hidden + piece * N, grad_norm_bias[piece], count);
  });
}

// ---- Sums of rows

// The table row of the token at a place of the order.
HOST_DEVICE int64_t table_row_at(const EmbeddingsScatter& op, int64_t place) {
  return read(op.index + read(op.order + place));
}

// Whether a table row has a gradient: it is in the table, and not the padding's.
HOST_DEVICE bool has_gradient(const EmbeddingsScatter& op, int64_t row) {
  return row >= 0 && row < op.table_rows && row != op.padding_idx;
}

constexpr int AHEAD = 8;  // rows that are loaded before the first of them is added

// Sums the runs of a chunk.
template <typename T, typename Lanes>
HOST_DEVICE void embeddings_scatter_chunk(const Lanes& lanes, const EmbeddingsScatter& op, int64_t chunk) {
  constexpr int N = Lanes::piece;
  const int64_t first = chunk * op.tokens_per_chunk;
  const int64_t end = first + op.tokens_per_chunk < op.tokens ? first + op.tokens_per_chunk : op.tokens;
  const int64_t before = first > 0 ? table_row_at(op, first - 1) : -1;
  const int64_t after = end < op.tokens ? table_row_at(op, end) : -1;

  for_pieces(lanes, op.hidden, [&](int piece, auto count) {
    Piece<N> sum = {}, terms[AHEAD];
    int64_t rows[AHEAD + 1], begin = first;
    for (int64_t place = first; place < end; place += AHEAD) {
      for (int i = 0; i <= AHEAD; ++i) rows[i] = place + i < end ? table_row_at(op, place + i) : after;
      for (int i = 0; i < AHEAD; ++i) {
        if (place + i >= end) break;
        terms[i] =
            load<Lanes>(static_cast<const T*>(op.rows) + read(op.order + place + i) * op.hidden + piece * N, count);
      }
      for (int i = 0; i < AHEAD; ++i) {
        if (place + i >= end) break;
        for (int j = 0; j < N; ++j) sum.x[j] += terms[i].x[j];
        if (rows[i + 1] == rows[i] && place + i + 1 < end) continue;
        // The run ends here, or goes on in the next chunk.
        const bool reaches_out = (begin == first && before == rows[i]) || (place + i + 1 == end && after == rows[i]);
        if (!has_gradient(op, rows[i])) {
        } else if (reaches_out) {
          store<Lanes>(op.partials + (chunk * 2 + (begin > first)) * op.hidden + piece * N, sum, count);
        } else {
          store<Lanes>(static_cast<T*>(op.table) + rows[i] * op.hidden + piece * N, sum, count);
        }
        sum = {}, begin = place + i + 1;
      }
    }
  });
}

// Adds up the sums of the run that starts in a chunk and reaches into the next ones, if there is one.
template <typename T, typename Lanes>
HOST_DEVICE void embeddings_scatter_join(const Lanes& lanes, const EmbeddingsScatter& op, int64_t chunk) {
  constexpr int N = Lanes::piece;
  const int64_t first = chunk * op.tokens_per_chunk, end = first + op.tokens_per_chunk;
  if (end >= op.tokens) return;
  const int64_t row = table_row_at(op, end - 1);
  const bool whole = table_row_at(op, first) == row;
  if (table_row_at(op, end) != row || (whole && first > 0 && table_row_at(op, first - 1) == row)) return;
  if (!has_gradient(op, row)) return;

  for_pieces(lanes, op.hidden, [&](int piece, auto count) {
    Piece<N> sum = load<Lanes>(op.partials + (chunk * 2 + !whole) * op.hidden + piece * N, count), terms[AHEAD];
    for (int64_t other = chunk + 1;; other += AHEAD) {
      int reached = 0;
      for (int i = 0; i < AHEAD; ++i) {
        const int64_t place = (other + i) * op.tokens_per_chunk;
        const bool reaches = place < op.tokens && table_row_at(op, place) == row;
        if (reaches) terms[i] = load<Lanes>(op.partials + (other + i) * 2 * op.hidden + piece * N, count);
        reached += reaches;
      }
      for (int i = 0; i < reached; ++i) {
        for (int j = 0; j < N; ++j) sum.x[j] += terms[i].x[j];
      }
      if (reached < AHEAD) break;
    }
    store<Lanes>(static_cast<T*>(op.table) + row * op.hidden + piece * N, sum, count);
  });
}

template <typename T, typename Lanes>
HOST_DEVICE void embeddings_clear_row(const Lanes& lanes, const EmbeddingsClear& op, int64_t token) {
  constexpr int N = Lanes::piece;
  if (op.ids[token] != op.padding_idx) return;
  for_pieces(lanes, op.hidden, [&](int piece, auto count) {
    store<Lanes>(static_cast<T*>(op.rows) + token * op.hidden + piece * N, Piece<N>{}, count);
  });
}

}  // namespace erniem_fast

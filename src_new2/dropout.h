// Dropout, one source for host and device: the same bits as erniem_fast/dropout.py.
#pragma once

#include "rows.h"

#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>

#include "vectors.h"
#define VECTORS_OF_WORDS
#endif

namespace erniem_fast {

// ---- Words of the generator, in the low halves of 64-bit lanes. The high halves are never read, so that a product of
// 64 bits needs no masking. With AVX2 or AVX-512 the lanes are those of a vector; otherwise there is one lane.

#ifdef VECTORS_OF_WORDS

typedef uint64_t Wide __attribute__((vector_size(sizeof(Vector))));

inline Wide multiply_low(Wide a, uint32_t b) {
#ifdef __AVX512F__
  return Wide(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(b)));
#else
  return Wide(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#endif
}

template <int... I>
inline Wide count_from(uint32_t first, std::integer_sequence<int, I...>) {
  return Wide{I...} + first;
}

// Stores words 0 to 3 of the first lane, then those of the next lane, and so on.
template <int... I>
inline void store_lanes(const Wide* words, uint32_t* to, std::integer_sequence<int, I...>) {
  const std::integer_sequence<int, (I % 2 == 0 ? I : WIDTH + I - 1)...> low_halves;
  const Vector left = pick(Vector(words[0]), Vector(words[1]), low_halves);
  const Vector right = pick(Vector(words[2]), Vector(words[3]), low_halves);
  const std::integer_sequence<int, (I / 4 * 2 + I % 2 + I % 4 / 2 * WIDTH)...> first;
  const std::integer_sequence<int, (I / 4 * 2 + I % 2 + I % 4 / 2 * WIDTH + WIDTH / 2)...> second;
  const Vector lanes[] = {pick(left, right, first), pick(left, right, second)};
  memcpy(to, lanes, sizeof lanes);
}

inline Wide count_from(uint32_t first) { return count_from(first, std::make_integer_sequence<int, WIDTH / 2>()); }

inline void store_lanes(const Wide* words, uint32_t* to) {
  store_lanes(words, to, std::make_integer_sequence<int, WIDTH>());
}

#else

using Wide = uint64_t;

HOST_DEVICE Wide multiply_low(Wide a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }

HOST_DEVICE Wide count_from(uint32_t first) { return first; }

HOST_DEVICE void store_lanes(const Wide* words, uint32_t* to) {
  for (int i = 0; i < 4; ++i) to[i] = uint32_t(words[i]);
}

#endif

// ---- The generator

// Philox4x32 with 7 rounds: turns the four words of each lane's counter into four random words.
HOST_DEVICE void philox(uint64_t seed, Wide* c) {
  uint64_t k0 = seed, k1 = seed >> 32;
  for (int round = 0; round < 7; ++round) {
    const Wide first = multiply_low(c[0], 0xD2511F53u), second = multiply_low(c[2], 0xCD9E8D57u);
    c[0] = (second >> 32) ^ c[1] ^ k0;
    c[2] = (first >> 32) ^ c[3] ^ k1;
    c[1] = second, c[3] = first;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

template <int N>
struct Words {
  uint32_t w[N];
};

// The words of N neighbouring elements; the last coordinate of the first one is 4 * group.
template <int N>
HOST_DEVICE Words<N> draw(uint64_t seed, uint32_t group, uint32_t column, uint32_t sequence, uint32_t head) {
  constexpr int LANES = sizeof(Wide) / sizeof(uint64_t);
  Words<N> words;
  for (int i = 0; i < N; i += 4 * LANES) {
    Wide c[] = {count_from(group + i / 4), Wide() + column, Wide() + sequence, Wide() + head};
    philox(seed, c);
    store_lanes(c, words.w + i);
  }
  return words;
}

// Applies dropout to a piece of a token's row: zeroes the dropped elements and rescales the others.
template <typename Op, int N>
HOST_DEVICE void drop(const Op& op, int64_t token, int piece, Piece<N>& values) {
  if (op.seed == nullptr) return;
  const uint32_t column = uint32_t(read(op.columns + token)), sequence = uint32_t(read(op.sequence_ids + token));
  const Words<N> words = draw<N>(uint64_t(read(op.seed)), uint32_t(piece * (N / 4)), column, sequence, 0);
  const uint32_t threshold = uint32_t(op.threshold);
  const float rescale = float(op.rescale);
  for (int i = 0; i < N; ++i) values.x[i] = words.w[i] >= threshold ? values.x[i] * rescale : 0.0f;
}

}  // namespace erniem_fast

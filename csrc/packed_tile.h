// Sums of products, by each instruction set: of 8-bit integers, unsigned ones of tokens and signed ones of a weight;
// and of bfloat16.
//
// A group is the neighbouring features that GROUP bytes hold: one instruction multiplies them and adds the products. A
// block is COLUMNS rows of the weight, which are columns of the result, group by group: [groups][COLUMNS][GROUP].
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <cpuid.h>
#include <immintrin.h>
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_AVX_VNNI
#endif
#if defined(__AVX512BW__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define HAS_AVX512_BF16
#endif
#endif

namespace erniem_fast {

constexpr int GROUP = 4, COLUMNS = 32;

inline int32_t load_group(const uint8_t* from) {
  int32_t group;
  memcpy(&group, from, sizeof group);
  return group;
}

// Writes sums[i, column] for ROWS tokens, whose rows are `stride` bytes apart, and all columns of a block; meanwhile
// fetches the block at `next` into the cache. `Dot` has `add(sums, x, weight)`, which adds the products of each lane's
// group to the lane's sum.
template <typename Dot, int ROWS>
[[gnu::always_inline]] inline void multiply_vectors(const uint8_t* x, int64_t stride, const int8_t* block,
                                                    const int8_t* next, int64_t groups, typename Dot::Sum* sums) {
  using Vector = typename Dot::Vector;
  using Sums = typename Dot::Sums;
  constexpr int LANES = sizeof(Vector) / GROUP, VECTORS = 2;
  for (int first = 0; first < COLUMNS; first += VECTORS * LANES) {
    Sums totals[ROWS][VECTORS] = {};
    for (int64_t group = 0; group < groups; ++group) {
      Vector right[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) {
        const int64_t offset = (group * COLUMNS + first + j * LANES) * GROUP;
        memcpy(&right[j], block + offset, sizeof(Vector));
        __builtin_prefetch(next + offset, 0, 2);
      }
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        const Vector left = Dot::broadcast(load_group(x + i * stride + group * GROUP));
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) totals[i][j] = Dot::add(totals[i][j], left, right[j]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) {
        memcpy(sums + i * COLUMNS + first + j * LANES, &totals[i][j], sizeof(Sums));
      }
    }
  }
}

// ---- The kernels. LEVELS is the largest unsigned integer, or BFLOAT16_LEVELS where there are no integers; MOST_ROWS
// the rows whose sums stay in registers.

constexpr int BFLOAT16_LEVELS = -1;

struct Plain {
  using Sum = int32_t;
  static constexpr int LEVELS = 255, MOST_ROWS = 4;
  static bool is_available() { return true; }

  template <int ROWS>
  static void multiply(const uint8_t* x, int64_t stride, const int8_t* block, const int8_t*, int64_t groups,
                       int32_t* sums) {
    memset(sums, 0, ROWS * COLUMNS * sizeof *sums);
    for (int64_t group = 0; group < groups; ++group, block += COLUMNS * GROUP) {
      for (int i = 0; i < ROWS; ++i) {
        const uint8_t* left = x + i * stride + group * GROUP;
        for (int column = 0; column < COLUMNS; ++column) {
          for (int k = 0; k < GROUP; ++k) sums[i * COLUMNS + column] += left[k] * block[column * GROUP + k];
        }
      }
    }
  }
};

#ifdef __AVX2__

struct Registers256 {
  using Vector = __m256i;
  using Sums = __m256i;
  using Sum = int32_t;
  static constexpr int MOST_ROWS = 6;
  static Vector broadcast(int32_t group) { return _mm256_set1_epi32(group); }
};

// The instruction adds pairs of products in 16 bits, and would saturate with unsigned integers of more than 7 bits.
struct Avx2 : Registers256 {
  static constexpr int LEVELS = 127;
  static bool is_available() { return true; }
  static Vector add(Vector sums, Vector x, Vector weight) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weight), _mm256_set1_epi16(1)));
  }

  template <int ROWS>
  static void multiply(const uint8_t* x, int64_t stride, const int8_t* block, const int8_t* next, int64_t groups,
                       int32_t* sums) {
    multiply_vectors<Avx2, ROWS>(x, stride, block, next, groups, sums);
  }
};

// The processor's features of leaf 7. Asking for them is slow in a virtual machine, so callers keep the answer.
struct Features {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Features(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};

#endif

#ifdef __AVX512BW__

template <typename Totals, typename Total>
struct Registers512 {
  using Vector = __m512i;
  using Sums = Totals;
  using Sum = Total;
  static constexpr int MOST_ROWS = 12;
  static Vector broadcast(int32_t group) { return _mm512_set1_epi32(group); }
};

struct Avx512 : Registers512<__m512i, int32_t> {
  static constexpr int LEVELS = Avx2::LEVELS;
  static bool is_available() { return true; }
  static Vector add(Vector sums, Vector x, Vector weight) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(x, weight), _mm512_set1_epi16(1)));
  }

  template <int ROWS>
  static void multiply(const uint8_t* x, int64_t stride, const int8_t* block, const int8_t* next, int64_t groups,
                       int32_t* sums) {
    multiply_vectors<Avx512, ROWS>(x, stride, block, next, groups, sums);
  }
};

#endif

#ifdef HAS_AVX_VNNI

struct AvxVnni : Registers256 {
  static constexpr int LEVELS = 255;
  static bool is_available() {
    static const bool has_it = Features(1).eax >> 4 & 1;
    return has_it;
  }
  __attribute__((target("avxvnni"))) static Vector add(Vector sums, Vector x, Vector weight) {
    return _mm256_dpbusd_avx_epi32(sums, x, weight);
  }

  template <int ROWS>
  __attribute__((target("avxvnni"))) static void multiply(const uint8_t* x, int64_t stride, const int8_t* block,
                                                          const int8_t* next, int64_t groups, int32_t* sums) {
    multiply_vectors<AvxVnni, ROWS>(x, stride, block, next, groups, sums);
  }
};

#endif

#ifdef __AVX512BW__

struct Avx512Vnni : Registers512<__m512i, int32_t> {
  static constexpr int LEVELS = 255;
  static bool is_available() {
    static const bool has_it = Features(0).ecx >> 11 & 1;
    return has_it;
  }
  __attribute__((target("avx512vnni"))) static Vector add(Vector sums, Vector x, Vector weight) {
    return _mm512_dpbusd_epi32(sums, x, weight);
  }

  template <int ROWS>
  __attribute__((target("avx512vnni"))) static void multiply(const uint8_t* x, int64_t stride, const int8_t* block,
                                                             const int8_t* next, int64_t groups, int32_t* sums) {
    multiply_vectors<Avx512Vnni, ROWS>(x, stride, block, next, groups, sums);
  }
};

#endif

#ifdef HAS_AVX512_BF16

struct Avx512Bf16 : Registers512<__m512, float> {
  static constexpr int LEVELS = BFLOAT16_LEVELS;
  static bool is_available() {
    static const bool has_it = Features(1).eax >> 5 & 1;
    return has_it;
  }
  __attribute__((target("avx512bf16"))) static Sums add(Sums sums, Vector x, Vector weight) {
    return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)weight);
  }

  template <int ROWS>
  __attribute__((target("avx512bf16"))) static void multiply(const uint8_t* x, int64_t stride, const int8_t* block,
                                                             const int8_t* next, int64_t groups, float* sums) {
    multiply_vectors<Avx512Bf16, ROWS>(x, stride, block, next, groups, sums);
  }
};

#endif

// ---- The kernels by number

// Of those of integers the best one last; erniem_fast/native/packed.py has the same numbers.
enum PackedKernel { PLAIN, AVX2, AVX512, AVX_VNNI, AVX512_VNNI, AVX512_BF16 };

// Calls `body` with the kernel; returns whether this library and processor have it.
template <typename Body>
bool with_packed_kernel(int64_t kernel, const Body& body) {
  const auto call = [&](auto found) {
    if (!found.is_available()) return false;
    body(found);
    return true;
  };
  switch (kernel) {
    case PLAIN:
      return call(Plain());
#ifdef __AVX2__
    case AVX2:
      return call(Avx2());
#endif
#ifdef __AVX512BW__
    case AVX512:
      return call(Avx512());
#endif
#ifdef HAS_AVX_VNNI
    case AVX_VNNI:
      return call(AvxVnni());
#endif
#ifdef __AVX512BW__
    case AVX512_VNNI:
      return call(Avx512Vnni());
#endif
#ifdef HAS_AVX512_BF16
    case AVX512_BF16:
      return call(Avx512Bf16());
#endif
    default:
      return false;
  }
}

}  // namespace erniem_fast

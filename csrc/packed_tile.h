// Sums of products, by each instruction set: of 8-bit integers, unsigned ones of tokens and signed ones of a weight; of
// bfloat16; and of float32.
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
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_AVX_VNNI
#endif
#if defined(__AVX512BW__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define HAS_AVX512_BF16
#endif
#if defined(__AVX512BW__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX
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

// ---- The kernels. LEVELS is the largest unsigned integer, or what stands for a floating-point format; MOST_ROWS the
// rows whose sums stay in registers.

constexpr int BFLOAT16_LEVELS = -1, FLOAT32_LEVELS = -2;

struct Plain {
  using Sum = int32_t;
  static constexpr int LEVELS = 255, MOST_ROWS = 4, BLOCK_TOKENS = 48;
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

template <typename Totals, typename Total>
struct Registers256 {
  using Vector = __m256i;
  using Sums = Totals;
  using Sum = Total;
  static constexpr int MOST_ROWS = 6, BLOCK_TOKENS = 48;
  static Vector broadcast(int32_t group) { return _mm256_set1_epi32(group); }
};

// The instruction adds pairs of products in 16 bits, and would saturate with unsigned integers of more than 7 bits.
struct Avx2 : Registers256<__m256i, int32_t> {
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

struct Avx2Float : Registers256<__m256, float> {
  static constexpr int LEVELS = FLOAT32_LEVELS, BLOCK_TOKENS = 96;
  static bool is_available() { return true; }
  static Sums add(Sums sums, Vector x, Vector weight) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(weight), sums);
  }

  template <int ROWS>
  static void multiply(const uint8_t* x, int64_t stride, const int8_t* block, const int8_t* next, int64_t groups,
                       float* sums) {
    multiply_vectors<Avx2Float, ROWS>(x, stride, block, next, groups, sums);
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
  static constexpr int MOST_ROWS = 12, BLOCK_TOKENS = 48;
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

#ifdef __AVX512BW__

struct Avx512Float : Registers512<__m512, float> {
  static constexpr int LEVELS = FLOAT32_LEVELS, BLOCK_TOKENS = 96;
  static bool is_available() { return true; }
  static Sums add(Sums sums, Vector x, Vector weight) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(weight), sums);
  }

  template <int ROWS>
  static void multiply(const uint8_t* x, int64_t stride, const int8_t* block, const int8_t* next, int64_t groups,
                       float* sums) {
    multiply_vectors<Avx512Float, ROWS>(x, stride, block, next, groups, sums);
  }
};

#endif

#ifdef HAS_AVX_VNNI

struct AvxVnni : Registers256<__m256i, int32_t> {
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

#ifdef HAS_AMX

// AMX multiplies a matrix of 16 tokens by one of 16 columns, both of 16 groups. Of its eight registers four hold the
// sums of 32 tokens and 32 columns, two tokens, and two the weight.
constexpr int AMX_ROWS = 16, AMX_BYTES = AMX_ROWS * GROUP;

#define AMX_TARGET __attribute__((target("amx-tile,amx-int8,amx-bf16")))

// How much of the registers is used, for at most 32 tokens and at most 16 groups; as the processor reads it.
struct alignas(64) AmxShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  AmxShapes(int tokens, int groups) {
    const int upper = tokens < AMX_ROWS ? tokens : AMX_ROWS, lower = tokens - upper;
    const int rows_of[] = {upper, upper, lower, lower, upper, lower, groups, groups};
    for (int i = 0; i < 8; ++i) {
      rows[i] = uint8_t(rows_of[i]);
      bytes[i] = uint16_t(rows[i] == 0 ? 0 : i == 4 || i == 5 ? groups * GROUP : AMX_BYTES);
    }
  }
};

// Linux grants the registers to processes that ask for them.
inline bool may_use_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return granted;
}

// Adds the products of `groups` groups, a multiple of `step`, to the sums, or for the FIRST groups to zero. `Dot` has
// `add_upper` and `add_lower`, which multiply the registers of the first 16 tokens and of those after them.
template <typename Dot, bool FIRST>
AMX_TARGET [[gnu::always_inline]] inline void multiply_groups(int tokens, const uint8_t* x, int64_t stride,
                                                              const int8_t* block, const int8_t* next, int64_t groups,
                                                              int step, typename Dot::Sum* sums) {
  constexpr int ROW = COLUMNS * GROUP;
  const AmxShapes shapes(tokens, step);
  _tile_loadconfig(&shapes);  // which fills all registers with zeros
  const bool both = tokens > AMX_ROWS;
  typename Dot::Sum* lower = sums + AMX_ROWS * COLUMNS;
  if (!FIRST) {
    _tile_loadd(0, sums, ROW);
    _tile_loadd(1, sums + AMX_ROWS, ROW);
    if (both) {
      _tile_loadd(2, lower, ROW);
      _tile_loadd(3, lower + AMX_ROWS, ROW);
    }
  }
  for (int64_t group = 0; group < groups; group += step) {
    _tile_loadd(6, block + group * ROW, ROW);
    _tile_loadd(7, block + group * ROW + AMX_BYTES, ROW);
    _tile_loadd(4, x + group * GROUP, stride);
    Dot::add_upper();
    if (both) {
      _tile_loadd(5, x + AMX_ROWS * stride + group * GROUP, stride);
      Dot::add_lower();
    }
    for (int line = 0; line < step * ROW; line += 64) __builtin_prefetch(next + group * ROW + line, 0, 2);
  }
  _tile_stored(0, sums, ROW);
  _tile_stored(1, sums + AMX_ROWS, ROW);
  if (both) {
    _tile_stored(2, lower, ROW);
    _tile_stored(3, lower + AMX_ROWS, ROW);
  }
}

template <typename Dot>
AMX_TARGET [[gnu::always_inline]] inline void multiply_matrices(int tokens, const uint8_t* x, int64_t stride,
                                                                const int8_t* block, const int8_t* next, int64_t groups,
                                                                typename Dot::Sum* sums) {
  const int64_t rest = groups % AMX_ROWS, whole = groups - rest;
  asm volatile("" ::: "memory");  // GCC does not know that the instructions below read memory
  multiply_groups<Dot, true>(tokens, x, stride, block, next, whole, AMX_ROWS, sums);
  if (rest > 0) {
    const int64_t skipped = whole * COLUMNS * GROUP;
    multiply_groups<Dot, false>(tokens, x + whole * GROUP, stride, block + skipped, next + skipped, rest, int(rest),
                                sums);
  }
  _tile_release();
  asm volatile("" ::: "memory");
}

struct AmxInt8 {
  using Sum = int32_t;
  static constexpr int LEVELS = 255, MOST_ROWS = 2 * AMX_ROWS, BLOCK_TOKENS = 256;
  static bool is_available() {
    static const bool has_it = (Features(0).edx >> 24 & 3) == 3 && may_use_amx();  // tiles and integers
    return has_it;
  }
  AMX_TARGET static void add_upper() {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  AMX_TARGET static void add_lower() {
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }

  template <int ROWS>
  AMX_TARGET static void multiply(const uint8_t* x, int64_t stride, const int8_t* block, const int8_t* next,
                                  int64_t groups, Sum* sums) {
    multiply_matrices<AmxInt8>(ROWS, x, stride, block, next, groups, sums);
  }
};

struct AmxBf16 {
  using Sum = float;
  static constexpr int LEVELS = BFLOAT16_LEVELS, MOST_ROWS = 2 * AMX_ROWS, BLOCK_TOKENS = 256;
  static bool is_available() {
    static const bool has_it = (Features(0).edx >> 22 & 5) == 5 && may_use_amx();  // bfloat16 and tiles
    return has_it;
  }
  AMX_TARGET static void add_upper() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  AMX_TARGET static void add_lower() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  template <int ROWS>
  AMX_TARGET static void multiply(const uint8_t* x, int64_t stride, const int8_t* block, const int8_t* next,
                                  int64_t groups, Sum* sums) {
    multiply_matrices<AmxBf16>(ROWS, x, stride, block, next, groups, sums);
  }
};

#endif

// ---- The kernels by number

// Of each format the best one last; erniem_fast/native/packed.py has the same numbers.
enum PackedKernel {
  PLAIN,
  AVX2,
  AVX512,
  AVX_VNNI,
  AVX512_VNNI,
  AMX_INT8,
  AVX512_BF16,
  AMX_BF16,
  AVX2_FLOAT,
  AVX512_FLOAT
};

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
#ifdef HAS_AMX
    case AMX_INT8:
      return call(AmxInt8());
    case AMX_BF16:
      return call(AmxBf16());
#endif
#ifdef __AVX2__
    case AVX2_FLOAT:
      return call(Avx2Float());
#endif
#ifdef __AVX512BW__
    case AVX512_FLOAT:
      return call(Avx512Float());
#endif
    default:
      return false;
  }
}

}  // namespace erniem_fast

// The `embeddings` op on CUDA devices: a warp computes a row, with the arithmetic of embeddings.h.
//
// Kernels run on the caller's stream, and the host never waits for the device. Between its passes a row of the base or
// the large model is kept in registers, so that all its loads are in flight at once; any other in shared memory. Each
// lane reads back only the elements that it wrote itself, so that no barrier is needed.
#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "boundary.h"
#include "embeddings.h"

namespace erniem_fast {

extern __shared__ float4 shared[];

namespace {

constexpr int WARP = 32;
constexpr int MAX_WARPS = 4;  // per block; with small blocks less of the device is idle at the end of a launch
constexpr size_t FREE_SHARED = 48 * 1024;  // bytes of a block that need no cudaFuncSetAttribute on any device

// `ALIGNED`: every row starts at a multiple of 16 bytes and has a whole number of pieces of N elements. HIDDEN is the
// number of elements of a row that is kept in registers, otherwise 0.
template <int N, bool ALIGNED, int HIDDEN = 0>
struct Lanes {
  static constexpr int piece = N;
  static constexpr bool aligned = ALIGNED;
  static constexpr int held = HIDDEN / (N * WARP);
  int lane, count;

  // The sum over the lanes of a warp. Every lane of the warp must call this.
  __device__ float sum(float x) const {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

// 16 bytes of elements: at least four, which share one evaluation of the generator.
template <typename T>
constexpr int PIECE = 16 / sizeof(T);

// A row in the registers of a warp's lanes; each has its own pieces alone.
template <typename L>
struct Held {
  Piece<L::piece> pieces[L::held];
  __device__ Piece<L::piece>& operator[](int piece) { return pieces[piece / WARP]; }
};

// COUNT rows of a warp's own, in registers or in shared memory.
template <typename L, int COUNT>
struct Rows {
  std::conditional_t<(L::held > 0), Held<L>, Piece<L::piece>*> row[COUNT];

  __device__ explicit Rows(int64_t hidden) {
    if constexpr (L::held == 0) {
      const size_t size = pieces_of(hidden, L::piece), first = threadIdx.x / WARP * COUNT;
      for (int i = 0; i < COUNT; ++i) row[i] = reinterpret_cast<Piece<L::piece>*>(shared) + (first + i) * size;
    }
  }
};

// The index of the warp's row, chunk or token.
__device__ int64_t warp_index() { return int64_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP; }

template <typename T, typename L>
__global__ void forward_kernel(const EmbeddingsForward op) {
  if (warp_index() >= op.tokens) return;
  const L lanes = {int(threadIdx.x % WARP), WARP};
  Rows<L, 1> rows(op.hidden);
  embeddings_forward_row<T>(lanes, op, warp_index(), rows.row[0]);
}

template <typename T, typename L>
__global__ void backward_kernel(const EmbeddingsBackward op) {
  if (warp_index() >= chunks_of(op)) return;
  const L lanes = {int(threadIdx.x % WARP), WARP};
  Rows<L, 4> rows(op.hidden);
  embeddings_backward_chunk<T>(lanes, op, warp_index(), rows.row[0], rows.row[1], rows.row[2], rows.row[3]);
}

// The kernels below have few rows at once, so the pieces of a row are spread over the lanes of the grid's second
// dimension.
template <typename L>
__device__ L lanes_of_grid() {
  return {int(blockIdx.y * WARP + threadIdx.x % WARP), int(gridDim.y * WARP)};
}

template <typename T, typename L>
__global__ void scatter_kernel(const EmbeddingsScatter op) {
  if (warp_index() < chunks_of(op)) embeddings_scatter_chunk<T>(lanes_of_grid<L>(), op, warp_index());
}

template <typename T, typename L>
__global__ void join_kernel(const EmbeddingsScatter op) {
  if (warp_index() < chunks_of(op)) embeddings_scatter_join<T>(lanes_of_grid<L>(), op, warp_index());
}

template <typename T, typename L>
__global__ void clear_kernel(const EmbeddingsClear op) {
  if (warp_index() < op.tokens) embeddings_clear_row<T>(lanes_of_grid<L>(), op, warp_index());
}

bool is_aligned(int64_t hidden, int piece, std::initializer_list<const void*> pointers) {
  bool aligned = hidden % piece == 0;
  for (const void* each : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(each) % 16 == 0;
  return aligned;
}

// Calls `body` with an element of the dtype and with lanes that are aligned if the rows are.
template <typename Body>
void with_lanes(int dtype, int64_t hidden, std::initializer_list<const void*> pointers, const Body& body) {
  with_dtype(dtype, [&](auto element) {
    constexpr int N = PIECE<decltype(element)>;
    if (is_aligned(hidden, N, pointers)) {
      body(element, Lanes<N, true>());
    } else {
      body(element, Lanes<N, false>());
    }
  });
}

// Like `with_lanes`, for kernels that keep rows: those of the base and the large model are held.
template <typename Body>
void with_rows(int dtype, int64_t hidden, std::initializer_list<const void*> pointers, const Body& body) {
  with_lanes(dtype, hidden, pointers, [&](auto element, auto lanes) {
    using L = decltype(lanes);
    if constexpr (L::aligned) {
      if (hidden == 768) return body(element, Lanes<L::piece, true, 768>());
      if (hidden == 1024) return body(element, Lanes<L::piece, true, 1024>());
    }
    body(element, lanes);
  });
}

// Launches `depth` warps for each of `items`; each warp keeps `rows` rows.
template <typename L, typename Op>
void launch(void (*kernel)(Op), const Op& op, int64_t items, int depth, int rows, cudaStream_t stream) {
  if (items == 0) return;
  const size_t bytes = L::held > 0 ? 0 : size_t(rows) * pieces_of(op.hidden, L::piece) * sizeof(Piece<L::piece>);
  int warps = MAX_WARPS;
  while (warps > 1 && warps * bytes > FREE_SHARED) warps /= 2;
  cudaError_t error = cudaSuccess;
  if (bytes > FREE_SHARED) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  }

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((items + warps - 1) / warps), unsigned(depth));
  config.blockDim = dim3(unsigned(warps * WARP));
  config.dynamicSmemBytes = warps * bytes;
  config.stream = stream;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, op);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next caller of CUDA's runtime would get otherwise
  throw std::runtime_error(cudaGetErrorString(error));
}

// The warps that have a lane for each piece of a row.
template <typename L>
int depth_of(int64_t hidden) {
  return (pieces_of(hidden, L::piece) + WARP - 1) / WARP;
}

}  // namespace

extern "C" const char* embeddings_forward(const EmbeddingsForward* op, int dtype, cudaStream_t stream) {
  const std::initializer_list<const void*> pointers = {
      op->word_table, op->position_table, op->weight, op->norm_bias, op->out, op->z};
  return error_of([&] {
    with_rows(dtype, op->hidden, pointers, [&](auto element, auto lanes) {
      using L = decltype(lanes);
      launch<L>(forward_kernel<decltype(element), L>, *op, op->tokens, 1, 1, stream);
    });
  });
}

extern "C" const char* embeddings_backward(const EmbeddingsBackward* op, int dtype, cudaStream_t stream) {
  const std::initializer_list<const void*> pointers = {op->grad, op->z, op->weight, op->grad_z, op->grad_norm};
  return error_of([&] {
    with_rows(dtype, op->hidden, pointers, [&](auto element, auto lanes) {
      using L = decltype(lanes);
      launch<L>(backward_kernel<decltype(element), L>, *op, chunks_of(*op), 1, 4, stream);
    });
  });
}

extern "C" const char* embeddings_scatter(const EmbeddingsScatter* op, int dtype, cudaStream_t stream) {
  return error_of([&] {
    with_lanes(dtype, op->hidden, {op->rows, op->partials, op->table}, [&](auto element, auto lanes) {
      using T = decltype(element);
      using L = decltype(lanes);
      launch<L>(scatter_kernel<T, L>, *op, chunks_of(*op), depth_of<L>(op->hidden), 0, stream);
      launch<L>(join_kernel<T, L>, *op, chunks_of(*op), depth_of<L>(op->hidden), 0, stream);
    });
  });
}

extern "C" const char* embeddings_clear(const EmbeddingsClear* op, int dtype, cudaStream_t stream) {
  return error_of([&] {
    with_lanes(dtype, op->hidden, {op->rows}, [&](auto element, auto lanes) {
      using L = decltype(lanes);
      launch<L>(clear_kernel<decltype(element), L>, *op, op->tokens, 1, 0, stream);
    });
  });
}

}  // namespace erniem_fast

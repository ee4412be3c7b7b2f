// Just enough of CUDA to run warp-wide kernels on a CPU: the lanes of a warp are 32 contexts of one thread, which take
// turns where they exchange values. (32 threads at a barrier may take minutes while other processes use the cores.)
// Warps run one after another, which is right for kernels that have no other barrier.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <memory>

#define __global__
#define __device__
#define __host__
#define __shared__

struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

constexpr int LANES = 32;
constexpr size_t SHARED_BYTES = 227 * 1024;  // of a block of an H100
constexpr size_t STACK_BYTES = 128 * 1024;   // of a lane

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline float exchanged[LANES];
inline ucontext_t launcher, contexts[LANES];
inline const void* launched;  // the Launch that runs

inline const char* cudaGetErrorString(cudaError_t) { return "too much shared memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return size_t(bytes) > SHARED_BYTES ? cudaErrorInvalidValue : cudaSuccess;
}

// Returns when every other lane of the warp has come here too.
inline void meet() {
  const dim3 thread = threadIdx, block = blockIdx;
  swapcontext(&contexts[thread.x % LANES], &launcher);
  threadIdx = thread, blockIdx = block;
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const int lane = threadIdx.x % LANES;
  exchanged[lane] = value;
  meet();
  const float other = exchanged[lane ^ mask];
  meet();
  return other;
}

template <typename Op>
struct Launch {
  void (*kernel)(Op);
  const Op& op;
  mutable bool is_running[LANES];
};

template <typename Op>
void run_lane(int lane) {
  const auto& launch = *static_cast<const Launch<Op>*>(launched);
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      for (threadIdx.x = lane; threadIdx.x < blockDim.x; threadIdx.x += LANES) launch.kernel(launch.op);
    }
  }
  launch.is_running[lane] = false;
}

template <typename Op>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Op), const Op& op) {
  gridDim = config->gridDim, blockDim = config->blockDim;
  const Launch<Op> launch = {kernel, op, {}};
  launched = &launch;
  const auto stacks = std::make_unique_for_overwrite<char[]>(LANES * STACK_BYTES);
  for (int lane = 0; lane < LANES; ++lane) {
    ucontext_t& context = contexts[lane];
    getcontext(&context);
    context.uc_stack.ss_sp = &stacks[lane * STACK_BYTES];
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = &launcher;
    makecontext(&context, reinterpret_cast<void (*)()>(&run_lane<Op>), 1, lane);
    launch.is_running[lane] = true;
  }
  for (bool is_running = true; is_running;) {
    is_running = false;
    for (int lane = 0; lane < LANES; ++lane) {
      if (launch.is_running[lane]) swapcontext(&launcher, &contexts[lane]);
      is_running |= launch.is_running[lane];
    }
  }
  return cudaSuccess;
}

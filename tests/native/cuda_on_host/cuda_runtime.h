// Just enough of CUDA to run warp-wide kernels on a CPU: the lanes of a warp are 32 threads that meet where they
// exchange values. Warps run one after another, which is right for kernels that have no other barrier.
#pragma once

#include <barrier>
#include <cstddef>
#include <thread>
#include <vector>

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

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline float exchanged[LANES];
inline std::barrier<> meeting(LANES);

inline const char* cudaGetErrorString(cudaError_t) { return "too much shared memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return size_t(bytes) > SHARED_BYTES ? cudaErrorInvalidValue : cudaSuccess;
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const int lane = threadIdx.x % LANES;
  exchanged[lane] = value;
  meeting.arrive_and_wait();
  const float other = exchanged[lane ^ mask];
  meeting.arrive_and_wait();
  return other;
}

template <typename Op>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Op), const Op& op) {
  gridDim = config->gridDim, blockDim = config->blockDim;
  const auto run_lane = [&](unsigned lane) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        for (threadIdx.x = lane; threadIdx.x < blockDim.x; threadIdx.x += LANES) kernel(op);
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned lane = 0; lane < LANES; ++lane) threads.emplace_back(run_lane, lane);
  for (std::thread& each : threads) each.join();
  return cudaSuccess;
}

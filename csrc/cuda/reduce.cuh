// Sums in a fixed order, and maxima, over the threads of a warp or a block.
#pragma once

#include <cuda_runtime.h>

namespace mistral_kernels::cuda {

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the warp, in every lane.
template <typename T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// The largest value of the warp, in every lane.
template <typename T>
__device__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The sum over a one-dimensional block of kThreads, in every thread. Call it once a kernel: a
// second call could overwrite `partial` while a slow warp still reads it.
template <int kThreads>
__device__ float block_sum(float value) {
  static_assert(kThreads % kWarpThreads == 0, "whole warps only");
  constexpr int kWarps = kThreads / kWarpThreads;
  static_assert(kWarps <= kWarpThreads, "one warp adds the partial sums");
  __shared__ float partial[kWarps];
  const int lane = threadIdx.x % kWarpThreads;
  value = warp_sum(value);
  if (lane == 0) partial[threadIdx.x / kWarpThreads] = value;
  __syncthreads();
  // Every warp adds the partial sums for itself, which saves a second barrier.
  return warp_sum(lane < kWarps ? partial[lane] : 0.0f);
}

}  // namespace mistral_kernels::cuda

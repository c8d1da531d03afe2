// What blocks that talk through global memory need.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mistral_kernels::cuda {

// Whatever this thread wrote before is visible to the whole device before what it writes after.
__device__ inline void fence_device() { __threadfence(); }

// Adds 1, or goes back to 0 where the value is `limit`; returns the value before. The limit + 1st
// caller gets `limit` and leaves 0 for the next launch.
__device__ inline uint32_t increment_wrapping(uint32_t* counter, uint32_t limit) {
  return atomicInc(counter, limit);
}

// What other blocks wrote: from L2, since L1 may hold what was there before.
__device__ inline float load_past_l1(const float* from) { return __ldcg(from); }
__device__ inline float4 load_past_l1(const float4* from) { return __ldcg(from); }

}  // namespace mistral_kernels::cuda

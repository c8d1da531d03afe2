// Host twin of memory_order.cuh. Other threads may run before each of these, as on a GPU; memory
// itself is sequentially consistent, so a missing fence does not show.
#pragma once

#include <cuda_runtime.h>

namespace mistral_kernels::cuda {

inline void fence_device() { __threadfence(); }

inline uint32_t increment_wrapping(uint32_t* counter, uint32_t limit) {
  return atomicInc(counter, limit);
}

template <typename T>  // float or float4
T load_past_l1(const T* from) {
  return __ldcg(from);
}

}  // namespace mistral_kernels::cuda

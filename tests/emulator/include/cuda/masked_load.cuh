// Host twin of masked_load.cuh: caches have no part in it.
#pragma once

#include <cuda_runtime.h>

namespace mistral_kernels::cuda {

inline uint4 load_streaming_16(const void* from, bool keep) {
  return keep ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}

inline uint4 load_cached_16(const void* from, bool keep) { return load_streaming_16(from, keep); }

inline uint2 load_cached_8(const void* from, bool keep) {
  return keep ? *static_cast<const uint2*>(from) : uint2{0, 0};
}

}  // namespace mistral_kernels::cuda

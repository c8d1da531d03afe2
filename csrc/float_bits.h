// The bits of a float, and how functions are declared that the CPU and CUDA share.
#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage: files of csrc/cpu are compiled once for each instruction set, and the linker
// must not give the code of one to another.
#ifdef __CUDACC__
#define MISTRAL_KERNELS_SHARED __host__ __device__ static inline
#else
#define MISTRAL_KERNELS_SHARED static inline
#endif

namespace mistral_kernels {

MISTRAL_KERNELS_SHARED uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MISTRAL_KERNELS_SHARED float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace mistral_kernels

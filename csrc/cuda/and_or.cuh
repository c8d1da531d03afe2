// Two bit operations as the one instruction that the compiler does not find: it would put both
// constants into instructions of their own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mistral_kernels::cuda {

// (word & mask) | bits
__device__ inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

}  // namespace mistral_kernels::cuda

// Widening of e4m3 by the instruction that sm_89 and up have for it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/float8_bits.cuh"

namespace mistral_kernels::cuda {

// The e4m3 in bytes 0 and 2 of `codes`, or in bytes 1 and 3 (kOdd), as two fp16, exactly.
template <bool kOdd>
__device__ uint32_t float8_halves(uint32_t codes) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  const uint32_t pairs = __byte_perm(codes, 0, 0x3120);
  const auto pair = static_cast<uint16_t>(kOdd ? pairs >> 16 : pairs);
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return halves;
#else
  return float8_halves_by_bits(kOdd ? codes >> 8 : codes);
#endif
}

}  // namespace mistral_kernels::cuda

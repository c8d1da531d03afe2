// Widening of e4m3 by operations on its bits, for GPUs without an instruction for it.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace mistral_kernels::cuda {

// The e4m3 in bytes 0 and 2 of `codes` as two fp16, exactly. Moved into the fields of an fp16 an
// e4m3 keeps its exponent, whose bias there is larger by 8: a factor of 256 is missing.
__device__ inline uint32_t float8_halves_by_bits(uint32_t codes) {
  const uint32_t magnitudes = (codes & 0x007f007fu) << 7;
  // Only NaN carries into bit 14, which then makes it a NaN of fp16.
  const uint32_t nan = (magnitudes + 0x00800080u) & 0x40004000u;
  const uint32_t moved = magnitudes | nan | (codes & 0x00800080u) << 8;
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &moved, sizeof(pair));
  pair = __hmul2(pair, __float2half2_rn(256.0f));
  uint32_t halves;
  memcpy(&halves, &pair, sizeof(halves));
  return halves;
}

}  // namespace mistral_kernels::cuda

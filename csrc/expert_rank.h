// The order in which a token's experts are chosen, on the CPU and on CUDA.
#pragma once

#include "float_bits.h"

namespace mistral_kernels {

// Where a logit stands among its row's: the larger rank is chosen first. Floats compare as their
// bits do once those of negative numbers are turned over; NaN stands above all numbers, and of
// equal logits (-0 and 0 among them) the lower expert. No two experts share a rank, and none is 0.
MISTRAL_KERNELS_SHARED uint64_t rank_of(float logit, uint32_t expert) {
  const uint32_t bits = logit == logit ? bits_of(logit + 0.0f) : 0x7fc00000u;  // one 0, one NaN
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | (~0u - expert);
}

MISTRAL_KERNELS_SHARED uint32_t expert_of(uint64_t rank) {
  return ~0u - static_cast<uint32_t>(rank);
}

}  // namespace mistral_kernels

// Turning kLanes rows of a matrix into kLanes columns, in registers.
#pragma once

#include "cpu/simd.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

// Lane i of rows[j] becomes lane j of rows[i].
inline void transpose(Floats (&rows)[kLanes]) {
  // Each round halves the distance, in one row of all elements, between those that belong together.
  for (int round = 1; round < kLanes; round *= 2) {
    Floats mixed[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      mixed[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

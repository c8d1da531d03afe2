// Turning kLanes rows of a matrix into kLanes columns, in registers.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

// {a0, b0, a1, b1, ...} from lane kFirst of both on.
template <int kFirst, int... kLane>
inline Floats interleave(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return shuffle<(kFirst + kLane / 2 + kLane % 2 * kLanes)...>(a, b);
}

// Lane i of rows[j] becomes lane j of rows[i].
inline void transpose(Floats (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  // Each round halves the distance, in one row of all elements, between those that belong together.
  for (int round = 1; round < kLanes; round *= 2) {
    Floats mixed[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], lanes);
      mixed[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2], lanes);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

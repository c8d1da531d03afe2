// The rotation of one head by its position, for every op that applies RoPE.
#pragma once

#include "cpu/simd.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

// to = from, each pair (a, b) turned to (a cos - b sin, b cos + a sin), times scale, rounded once.
//
// Pair i has the angle of cos[i] and sin[i], i < head_dim / 2. It is (from[2i], from[2i + 1]) when
// interleaved, else (from[i], from[i + head_dim / 2]). `to` may be `from`: every vector of pairs is
// read before it is written.
template <typename T, typename To>
inline void rotate(const T* from, To* to, const float* cos, const float* sin, int64_t head_dim,
                   bool interleaved, float scale) {
  const int64_t half = head_dim / 2;
  if (interleaved) {
    for_vectors(half, [&](int64_t i, int64_t count) {
      const int64_t low = 2 * count < kLanes ? 2 * count : kLanes;  // elements of the first vector
      const int64_t high = 2 * count - low;
      const Floats first = load(from + 2 * i, low), second = load(from + 2 * i + low, high);
      const Floats a = evens(first, second), b = odds(first, second);
      const Floats c = load(cos + i, count), s = load(sin + i, count);
      const Floats turned_a = (a * c - b * s) * scale, turned_b = (b * c + a * s) * scale;
      store(to + 2 * i, interleave_low(turned_a, turned_b), low);
      store(to + 2 * i + low, interleave_high(turned_a, turned_b), high);
    });
  } else {
    for_vectors(half, [&](int64_t i, int64_t count) {
      const Floats a = load(from + i, count), b = load(from + half + i, count);
      const Floats c = load(cos + i, count), s = load(sin + i, count);
      store(to + i, (a * c - b * s) * scale, count);
      store(to + half + i, (b * c + a * s) * scale, count);
    });
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// Rounding to the two formats of a quantised cache, the same bits on the CPU and on CUDA. Both
// round to nearest even and saturate.
#pragma once

#include "float_bits.h"

namespace mistral_kernels {

MISTRAL_KERNELS_SHARED int8_t int8_of(float value) {
  const float limited = value < -128.0f ? -128.0f : value < 127.0f ? value : 127.0f;
  // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
  return static_cast<int8_t>(bits_of(limited + 0x1.8p23f) & 0xffu);
}

// e4m3fn: no infinities, the largest number is 448.
MISTRAL_KERNELS_SHARED uint8_t float8_of(float value) {
  const uint32_t sign = (bits_of(value) >> 24) & 0x80u;
  const float magnitude = float_of(bits_of(value) & 0x7fffffffu);
  const float limited = magnitude < 448.0f ? magnitude : 448.0f;
  const uint32_t bits = bits_of(limited);
  // Normal numbers: change the bias by 120 and round to nearest even.
  const uint32_t normal = (bits - (120u << 23) + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;
  // Subnormal ones: 2^14 has units of 2^-9 like them, so the addition rounds for us.
  const uint32_t subnormal = bits_of(limited + 0x1p14f) - bits_of(0x1p14f);
  const uint32_t finite = limited < 0x1p-6f ? subnormal : normal;
  return static_cast<uint8_t>(sign | (value == value ? finite : 0x7fu));
}

}  // namespace mistral_kernels

// bf16 and fp16 to and from float with integer operations only: no instruction set is assumed.
// Selects instead of branches let compilers turn loops over them into SIMD code.
#pragma once

#include <cstdint>

#include "quantised.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

// Storage types: the bits of one element.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Int8 {
  int8_t bits;
};
struct Float8 {
  uint8_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  // Placed into a float's fields, exponent and fraction are too small by 2^(127 - 15). The
  // multiplication repairs that, subnormals included.
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const float magnitude = float_of((value.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x1p16f ? 0x7f800000u : 0u;  // inf and NaN
  return float_of(bits_of(magnitude) | infinite | sign);
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  // Adding half of the dropped part, less one for an even result, rounds to nearest even.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t bits = bits_of(value) & 0x7fffffffu;
  const float magnitude = float_of(bits);
  // Normal numbers: change the bias by 112 and round to nearest even.
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Subnormal ones: 0.5f has units of 2^-24 like them, so the addition rounds for us.
  const uint32_t subnormal = bits_of(magnitude + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < 0x1p-14f ? subnormal : normal;
  const uint32_t limited = magnitude < 65520.0f ? finite : 0x7c00u;  // 65520 is halfway to 2^16
  return {static_cast<uint16_t>(sign | (value == value ? limited : 0x7e00u))};
}

template <>
inline Int8 from_float<Int8>(float value) {
  return {int8_of(value)};
}

template <>
inline Float8 from_float<Float8>(float value) {
  return {float8_of(value)};
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

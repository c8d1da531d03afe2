// Elements of a quantised cache: rounding into them, and widening them into mma's operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/convert.cuh"
#include "quantised.h"

namespace mistral_kernels::cuda {

// Storage types: the bits of one element.
struct Int8 {
  int8_t bits;
};
struct Float8 {
  uint8_t bits;
};

template <typename Cache>
constexpr bool kIsQuantised = std::is_same_v<Cache, Int8> || std::is_same_v<Cache, Float8>;

// Widened codes of a Cache are worth 1 / kCodeUnit of what they stand for: an e4m3 moved into the
// fields of an fp16 keeps its exponent, whose bias there is larger by 8.
template <typename Cache>
constexpr float kCodeUnit = std::is_same_v<Cache, Float8> ? 256.0f : 1.0f;

template <>
__device__ inline Int8 from_float<Int8>(float value) {
  return {int8_of(value)};
}
template <>
__device__ inline Float8 from_float<Float8>(float value) {
  return {float8_of(value)};
}

// `value` as a cache of `scale` stores it.
template <typename Cache, typename T>
__device__ Cache as_stored(T value, float scale) {
  if constexpr (kIsQuantised<Cache>) {
    return from_float<Cache>(to_float(value) / scale);
  } else {
    return value;
  }
}

// Two numbers as T in one register, `low` in its lower half.
template <typename T>
__device__ uint32_t packed(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

template <typename T>
__device__ uint32_t widened_int8(uint32_t codes) {
  // The low byte of 2^23, counted from -128 on.
  const uint32_t counted = codes ^ 0x00800080u;
  const float low = float_of(0x4b000000u | (counted & 0xffu)) - (0x1p23f + 128.0f);
  const float high = float_of(0x4b000000u | (counted >> 16)) - (0x1p23f + 128.0f);
  return packed<T>(low, high);
}

template <typename T>
__device__ uint32_t widened_float8(uint32_t codes) {
  uint32_t result = (codes & 0x007f007fu) << 7 | (codes & 0x00800080u) << 8;
  // Only NaN carries into bit 14, which then makes it a NaN of fp16.
  result |= (((codes & 0x007f007fu) << 7) + 0x00800080u) & 0x40004000u;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    struct {
      __half low, high;
    } pair;
    memcpy(&pair, &result, sizeof(pair));
    result = packed<T>(to_float(pair.low), to_float(pair.high));
  }
  return result;
}

// Codes in bytes 0 and 2 of `codes`, the others 0, as two T.
template <typename T, typename Cache>
__device__ uint32_t widened(uint32_t codes) {
  if constexpr (std::is_same_v<Cache, Int8>) {
    return widened_int8<T>(codes);
  } else {
    return widened_float8<T>(codes);
  }
}

}  // namespace mistral_kernels::cuda

// Elements of a quantised cache: rounding into them, and widening them into mma's operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/convert.cuh"
#include "cuda/float8_halves.cuh"
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

// The same bits, as another type.
template <typename To, typename From>
__device__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither lost nor made up");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(to));
  return to;
}

// Two numbers as T in one register, `low` in its lower half.
template <typename T>
__device__ uint32_t packed(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  } else {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  }
}

template <typename T, bool kOdd>
__device__ uint32_t widened_int8(uint32_t codes) {
  constexpr uint32_t kBytes = kOdd ? 0x4341 : 0x4240;  // 1 and 3, or 0 and 2, each below a byte
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // From 128 on a bf16 counts in ones: 128 and the low 7 bits, less 128, or 256 by the sign bit.
    const uint32_t counted = __byte_perm(codes, 0x43434343u, kBytes);
    return bits_as<uint32_t>(__hsub2(bits_as<__nv_bfloat162>(counted & 0xff7fff7fu),
                                     bits_as<__nv_bfloat162>(counted & 0xff80ff80u)));
  } else {
    // From 1024 on an fp16 does: 1024 and the byte, counted from -128 on.
    const uint32_t counted = __byte_perm(codes ^ 0x80808080u, 0x64646464u, kBytes);
    return bits_as<uint32_t>(__hsub2(bits_as<__half2>(counted), __float2half2_rn(1024 + 128)));
  }
}

template <typename T, bool kOdd>
__device__ uint32_t widened_float8(uint32_t codes) {
  const uint32_t halves = float8_halves<kOdd>(codes);
  if constexpr (std::is_same_v<T, __half>) {
    return halves;
  } else {
    const float2 pair = __half22float2(bits_as<__half2>(halves));
    return packed<T>(pair.x, pair.y);
  }
}

// The codes in bytes 0 and 2 of `codes`, or in bytes 1 and 3 (kOdd), as two T.
template <typename T, typename Cache, bool kOdd>
__device__ uint32_t widened(uint32_t codes) {
  if constexpr (std::is_same_v<Cache, Int8>) {
    return widened_int8<T, kOdd>(codes);
  } else {
    return widened_float8<T, kOdd>(codes);
  }
}

}  // namespace mistral_kernels::cuda

// Host twin of the instruction that widens e4m3. What the shipped header does on older GPUs must
// give the same.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "cuda/float8_bits.cuh"

namespace mistral_kernels::cuda {

namespace twin {

inline float float8_value(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15);
  const int mantissa = static_cast<int>(code & 7);
  const float magnitude = (code & 0x7f) == 0x7f ? NAN
                          : exponent == 0       ? std::ldexp(mantissa, -9)
                                                : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

}  // namespace twin

template <bool kOdd>
uint32_t float8_halves(uint32_t codes) {
  if (kOdd) codes >>= 8;
  const uint32_t bits = float8_halves_by_bits(codes);
  uint32_t halves = 0;
  for (int shift : {0, 16}) {
    const float value = twin::float8_value(codes >> shift & 0xff);
    const auto half = static_cast<__half_raw>(__float2half_rn(value)).x;
    __half_raw other;
    other.x = static_cast<uint16_t>(bits >> shift);
    if (half != other.x && !(value != value && __hisnan(__half(other)))) {
      throw std::runtime_error("emulator: e4m3 widened by its bits is another number");
    }
    halves |= static_cast<uint32_t>(half) << shift;
  }
  return halves;
}

}  // namespace mistral_kernels::cuda

// How a CUDA launcher picks the kernel for a low-bit weight.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/low_bit_rows.cuh"

namespace mistral_kernels::cuda {

// Whether no step of a 4-bit row has columns of two groups.
inline bool steps_have_one_group(const LowBit& weight, int64_t columns) {
  return weight.group_size % Step<Int4>::kCodes == 0 || weight.group_size >= columns;
}

// Calls run(T{}, Codes{}, units), where `units` is the constant kUnits of LowBitRows.
template <typename Run>
void with_low_bit(const char* op, Dtype dtype, Dtype codes, bool one_group, const Run& run) {
  const auto with_codes = [&](auto element) {
    switch (codes) {
      case Dtype::kInt4:
        if (one_group) return run(element, Int4{}, std::integral_constant<int, 1>{});
        return run(element, Int4{}, std::integral_constant<int, 4>{});
      // Of 8 bits, two units at every group size: one would save a tenth of the instructions, and
      // cost as many kernels again.
      case Dtype::kInt8:
        return run(element, Int8{}, std::integral_constant<int, 2>{});
      case Dtype::kFloat8:
        return run(element, Float8{}, std::integral_constant<int, 2>{});
      default:
        throw std::invalid_argument(std::string(op) + ": codes must be int4, int8 or float8");
    }
  };
  switch (dtype) {
    case Dtype::kBFloat16:
      return with_codes(__nv_bfloat16{});
    case Dtype::kFloat16:
      return with_codes(__half{});
    default:
      throw std::invalid_argument(std::string(op) + ": dtype must be bfloat16 or float16");
  }
}

}  // namespace mistral_kernels::cuda

// Element types as they cross the Python boundary.
#pragma once

namespace mistral_kernels {

// The values are part of the binding: Python passes them as plain integers. Those behind kFloat16
// are formats of a quantised cache and of low-bit weights, kInt4 (two codes a byte) of weights
// only.
enum class Dtype : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt8 = 3,
  kFloat8 = 4,
  kInt4 = 5
};

}  // namespace mistral_kernels

// Element types as they cross the Python boundary.
#pragma once

namespace mistral_kernels {

// The values are part of the binding: Python passes them as plain integers.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace mistral_kernels

// Element types as they cross the Python boundary.
#pragma once

namespace mistral_kernels {

// The values are part of the binding: Python passes them as plain integers. The last two are
// formats of a quantised cache only.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8 = 4 };

}  // namespace mistral_kernels

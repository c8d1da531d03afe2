// What bindings.cpp calls: one launcher a device, on raw pointers, checked by the Python caller.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mistral_kernels {

// out = round(value * rsqrt(mean(value^2) + eps) * weight), value = x or round(x + residual).
struct RmsNorm {
  const void* x;         // (tokens, hidden), last dimension contiguous
  const void* residual;  // (tokens, hidden), last dimension contiguous; null: plain rms_norm
  const void* weight;    // (hidden,), dtype of x
  void* out;             // (tokens, hidden), contiguous
  void* summed;          // (tokens, hidden), contiguous: round(x + residual); null as residual is
  int64_t tokens;        // 0 is a no-op
  int64_t hidden;
  int64_t stride_x_token;         // in elements
  int64_t stride_residual_token;  // in elements
  float eps;
  Dtype dtype;
};

namespace cpu {
void rms_norm(const RmsNorm& args);
}

namespace cuda {
// Runs on `device` and its `stream` (a cudaStream_t). Throws std::runtime_error naming the op.
void rms_norm(const RmsNorm& args, int device, void* stream);

// As CUDA writes them, 1000 * major + 10 * minor. The driver is 0 where there is none.
int driver_version();
int runtime_version();
}  // namespace cuda

}  // namespace mistral_kernels

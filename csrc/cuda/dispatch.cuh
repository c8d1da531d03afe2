// How a CUDA launcher picks its element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "dtype.h"

namespace mistral_kernels::cuda {

// Calls run(T{}) with the element type of a dtype that kernels compute in.
template <typename Run>
void with_dtype(const char* op, Dtype dtype, Run&& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(float{});
    case Dtype::kBFloat16:
      return run(__nv_bfloat16{});
    case Dtype::kFloat16:
      return run(__half{});
    default:
      throw std::invalid_argument(std::string(op) + ": dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace mistral_kernels::cuda

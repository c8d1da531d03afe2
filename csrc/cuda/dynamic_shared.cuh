// The way to a kernel's dynamic shared memory. It is a function, since `extern __shared__` is not
// C++ and has one type a name.
#pragma once

#include <cuda_runtime.h>

namespace mistral_kernels::cuda {

// The block's dynamic shared memory, aligned to 128 bytes.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

}  // namespace mistral_kernels::cuda

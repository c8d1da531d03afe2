// How a CPU launcher picks its element type and its number of threads.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cpu/convert.h"
#include "dtype.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

// Calls run(T{}) with the storage type of a dtype that kernels compute in.
template <typename Run>
inline void with_dtype(Dtype dtype, Run&& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(float{});
    case Dtype::kBFloat16:
      return run(BFloat16{});
    case Dtype::kFloat16:
      return run(Float16{});
    default:
      throw std::invalid_argument("dtype: expected float32, bfloat16 or float16");
  }
}

// Below twice this many elements no second thread is woken. That costs 1-2 us while torch's pool
// still spins and 10-30 us once it sleeps, where rms_norm on one thread takes 6 us for 16 k
// elements and 12 us for 32 k (float32, 2-core Xeon at 2.5 GHz with AVX-512).
constexpr int64_t kElementsAThread = 16384;

// Threads worth waking for work on so many elements.
inline int team(int threads, int64_t elements) {
  const int64_t useful = elements / kElementsAThread;
  return useful < 2 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

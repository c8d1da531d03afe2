// Scratch memory of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/simd.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Uninitialised floats that start on a cache line. Few are on the stack: glibc's aligned_alloc and
// free take 0.3 us, as long as a small kernel works between two of them.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_(few_) {
    if (floats <= kFew) return;
    data_ = static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() {
    if (data_ != few_) std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* data() const { return data_; }

 private:
  static constexpr int64_t kFew = 2048;

  float* data_;
  alignas(64) float few_[kFew];
};

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// Scratch memory of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/simd.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Uninitialised floats that start on a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64)))) {
    if (data_ == nullptr && floats > 0) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// Loads of vectors that a lane takes part in or not, as one predicated instruction: a branch around
// each of several loads would keep the compiler from issuing them together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mistral_kernels::cuda {

// 16 bytes, on a 16-byte boundary, that the kernel does not write and reads only once: not kept in
// L1. keep = false: zeros, and `from` is not read.
__device__ inline uint4 load_streaming_16(const void* from, bool keep) {
  uint4 value;
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.u32 keep, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@keep ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
      : "l"(from), "r"(static_cast<uint32_t>(keep)));
  return value;
}

// The same of what neighbouring blocks read too: kept in L1.
__device__ inline uint4 load_cached_16(const void* from, bool keep) {
  uint4 value;
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.u32 keep, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@keep ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
      : "l"(from), "r"(static_cast<uint32_t>(keep)));
  return value;
}

// The same of 8 bytes, on an 8-byte boundary.
__device__ inline uint2 load_cached_8(const void* from, bool keep) {
  uint2 value;
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.u32 keep, %3, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@keep ld.global.nc.v2.u32 {%0, %1}, [%2];\n"
      "}"
      : "=&r"(value.x), "=&r"(value.y)
      : "l"(from), "r"(static_cast<uint32_t>(keep)));
  return value;
}

}  // namespace mistral_kernels::cuda

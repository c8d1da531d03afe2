// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80).
//
// A thread sees its own copies after wait_copies; other threads of the block after a barrier that
// follows the wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mistral_kernels::cuda {

// Starts a copy of 16 bytes, both addresses on 16-byte boundaries, past L1. Where `keep` is false
// it writes zeros and does not read `global`, which must be a valid address all the same.
__device__ inline void copy_async_16(void* shared, const void* global, bool keep) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = keep ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last commit; a group may be empty.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest kPending groups of this thread are still under way.
template <int kPending>
__device__ void wait_copies() {
  static_assert(kPending >= 0, "a number of groups");
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace mistral_kernels::cuda

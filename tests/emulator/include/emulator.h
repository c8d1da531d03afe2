// Runs the threads of a block as fibers (ucontext) of one host thread; blocks run one by one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>

namespace emulator {

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

// Calls `thread` once for every thread of the grid. Throws std::runtime_error for what would hang
// or be undefined on a GPU: barriers that not all threads reach, shuffles with absent lanes.
cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Barriers. Threads that have returned count as arrived at the block's, as on the hardware.
void sync_block();
void sync_warp(unsigned mask);

int lane();                                    // of the thread that runs
void* dynamic_shared();                        // config.dynamicSmemBytes bytes
uint64_t* warp_slots();                        // one a lane, for shuffles
void require_lane(unsigned mask, int source);  // throws if the lane takes no part

// The value that lane `source` passed to the same call.
template <typename T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 64 bits");
  require_lane(mask, source);
  std::memcpy(&warp_slots()[lane()], &value, sizeof(T));
  sync_warp(mask);
  T received;
  std::memcpy(&received, &warp_slots()[source], sizeof(T));
  sync_warp(mask);  // no lane may write its next value before all have read this one
  return received;
}

}  // namespace emulator

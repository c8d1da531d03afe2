// What the twins of CUDA's headers are made of: threads are fibers of one host thread, which
// switch only in the functions below.
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

// Calls `thread` once for every thread of a grid of `kernel`. Throws std::runtime_error for what
// would hang or be undefined on a GPU: barriers that not all threads reach, shuffles with absent
// lanes.
cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel,
                     const std::function<void()>& thread);

// Barriers. Threads that have returned count as arrived at the block's, as on the hardware.
void sync_block();
void sync_warp(unsigned mask);

// Lets other threads run, where the order allows it: called before whatever other blocks may see.
void yield();

// What one lane brings to a collective operation, and where its result goes.
struct Lane {
  const void* input;
  void* output;
};

constexpr unsigned kAllLanes = 0xffffffffu;

// All lanes of `mask` call it with the same `operation`, which the last to arrive runs for all of
// them; `lanes` has 32 entries, those outside of the mask null. Throws where they call different
// ones.
using Operation = void (*)(const Lane* lanes, unsigned mask);
void collective(unsigned mask, const void* input, void* output, Operation operation);

int lane();                                    // of the thread that runs
void require_lane(unsigned mask, int source);  // throws if the lane takes no part
void require_aligned(const void* address, size_t bytes, const char* instruction);

// Dynamic shared memory of the block, config.dynamicSmemBytes bytes.
void* dynamic_shared();

// Copies to shared memory that are made when their group is waited for, oldest group first.
void start_copy(void* shared, const void* global, size_t bytes, bool keep);
void commit_copies();
void wait_copies(int pending);

// The value that lane `source` passed to the same call.
template <typename T>
T exchange(unsigned mask, T value, int source) {
  struct Sent {
    T value;
    int source;
  };
  require_lane(mask, source);
  const Sent sent{value, source};
  T received;
  collective(mask, &sent, &received, [](const Lane* lanes, unsigned members) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(members >> lane & 1u)) continue;
      const int from = static_cast<const Sent*>(lanes[lane].input)->source;
      *static_cast<T*>(lanes[lane].output) = static_cast<const Sent*>(lanes[from].input)->value;
    }
  });
  return received;
}

}  // namespace emulator

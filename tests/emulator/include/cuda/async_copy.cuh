// Host twin of the asynchronous copies: a copy is made when its group is waited for, and until
// then its destination holds poison.
#pragma once

#include "emulator.h"

namespace mistral_kernels::cuda {

inline void copy_async_16(void* shared, const void* global, bool keep) {
  emulator::start_copy(shared, global, 16, keep);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int kPending>
void wait_copies() {
  static_assert(kPending >= 0, "a number of groups");
  emulator::wait_copies(kPending);
}

}  // namespace mistral_kernels::cuda

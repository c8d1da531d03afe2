// Host twin of the header through which a kernel gets its dynamic shared memory.
#pragma once

#include "emulator.h"

namespace mistral_kernels::cuda {

// The block's dynamic shared memory, aligned to 128 bytes.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

}  // namespace mistral_kernels::cuda

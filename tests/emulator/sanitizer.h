// Tells AddressSanitizer about fibers; nothing without it.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator::sanitizer {

#ifdef __SANITIZE_ADDRESS__

inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;

// Scheduler side, around the switch.
inline void enter_fiber(const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack, bytes);
}
inline void returned_to_scheduler() {
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// Fiber side: at its start, before it switches away (null: for good), after it was resumed.
inline void entered_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
}
inline void leave_fiber(void** fake_stack) {
  __sanitizer_start_switch_fiber(fake_stack, scheduler_stack, scheduler_stack_bytes);
}
inline void resumed_fiber(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

// A stack is used again by the next block; the frames of a fiber that never returned must go.
inline void forget_frames(const void* stack, size_t bytes) {
  __asan_unpoison_memory_region(stack, bytes);
}

// Memory that must not be touched during its lifetime.
class Forbidden {
 public:
  Forbidden(const void* begin, size_t bytes) : begin_(begin), bytes_(bytes) {
    __asan_poison_memory_region(begin_, bytes_);
  }
  ~Forbidden() { __asan_unpoison_memory_region(begin_, bytes_); }
  Forbidden(const Forbidden&) = delete;
  Forbidden& operator=(const Forbidden&) = delete;

 private:
  const void* begin_;
  size_t bytes_;
};

#else

inline void enter_fiber(const void*, size_t) {}
inline void returned_to_scheduler() {}
inline void entered_fiber() {}
inline void leave_fiber(void**) {}
inline void resumed_fiber(void*) {}
inline void forget_frames(const void*, size_t) {}

struct Forbidden {
  Forbidden(const void*, size_t) {}
};

#endif

}  // namespace emulator::sanitizer

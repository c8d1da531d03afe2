// A stack of its own and the place where its code goes on: one GPU thread.
#pragma once

#include <cstddef>
#include <memory>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // The next resume() enters `body`, wherever the fiber was before. `body` must not throw.
  void start(void (*body)());

  // Called by the scheduler: runs the fiber until it suspends itself or `body` returns.
  void resume();

  // Called by the fiber: goes back to the scheduler until the next resume().
  void suspend();

 private:
  [[noreturn]] static void enter();
  void switch_in();
  void switch_out();

  static constexpr size_t kStackBytes = 128 * 1024;
  std::unique_ptr<char[]> stack_;
  void (*body_)() = nullptr;
  bool returned_ = true;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emulator

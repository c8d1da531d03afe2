#include "fiber.h"

#include <cstdint>

#include "sanitizer.h"

#ifdef __x86_64__
// Saves the registers that a call must keep, goes over to another stack and restores its registers.
// swapcontext does the same with two system calls, which would be most of the emulator's time.
extern "C" void emulator_switch_stack(void** save_pointer, void* pointer);
asm(R"(
.text
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, . - emulator_switch_stack
)");
#endif

namespace emulator {
namespace {

Fiber* entering;  // the fiber that enter() starts on
#ifdef __x86_64__
void* scheduler;  // its stack pointer
#else
ucontext_t scheduler;
#endif

}  // namespace

void Fiber::start(void (*body)()) {
  // Memory of the stack is left uninitialised: most of it is never touched.
  if (!stack_) stack_.reset(new char[kStackBytes]);
  if (!returned_) sanitizer::forget_frames(stack_.get(), kStackBytes);
  body_ = body;
  returned_ = false;
  fake_stack_ = nullptr;
#ifdef __x86_64__
  // As emulator_switch_stack leaves a stack: six registers, then the address to return to. Above
  // it lies that of enter's caller, which ends a walk up the stack.
  const auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&Fiber::enter);
  stack_pointer_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = kStackBytes;
  makecontext(&context_, &Fiber::enter, 0);
#endif
}

void Fiber::switch_in() {
#ifdef __x86_64__
  emulator_switch_stack(&scheduler, stack_pointer_);
#else
  swapcontext(&scheduler, &context_);
#endif
}

void Fiber::switch_out() {
#ifdef __x86_64__
  emulator_switch_stack(&stack_pointer_, scheduler);
#else
  swapcontext(&context_, &scheduler);
#endif
}

void Fiber::resume() {
  entering = this;
  sanitizer::enter_fiber(stack_.get(), kStackBytes);
  switch_in();
  sanitizer::returned_to_scheduler();
}

void Fiber::suspend() {
  sanitizer::leave_fiber(&fake_stack_);
  switch_out();
  sanitizer::resumed_fiber(fake_stack_);
}

void Fiber::enter() {
  Fiber* self = entering;
  sanitizer::entered_fiber();
  self->body_();
  self->returned_ = true;
  sanitizer::leave_fiber(nullptr);  // for good
  self->switch_out();
  __builtin_unreachable();
}

}  // namespace emulator

#include "emulator.h"

#include <ucontext.h>

#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "sanitizer.h"

namespace emulator {

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace {

constexpr int kWarpThreads = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of one block on sm_90

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kReturned };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
  State state;
  unsigned warp_mask;  // of the warp barrier it waits at
  uint3 index;
  void* fake_stack = nullptr;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;  // of the block that runs; the stacks are kept for the next one
Fiber* running;
const std::function<void()>* thread_body;
std::exception_ptr failure;
uint64_t slots[kMaxThreads];
alignas(128) char shared_bytes[kMaxSharedBytes];

int running_index() { return static_cast<int>(running - fibers.data()); }

void fiber_main() {
  sanitizer::entered_fiber();
  try {
    (*thread_body)();
  } catch (...) {
    failure = std::current_exception();
  }
  running->state = State::kReturned;
  sanitizer::leave_fiber(nullptr);  // for good; uc_link leads back to the scheduler
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  sanitizer::enter_fiber(fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  sanitizer::returned_to_scheduler();
}

void wait(State state) {
  Fiber* self = running;
  self->state = state;
  sanitizer::leave_fiber(&self->fake_stack);
  swapcontext(&self->context, &scheduler);
  sanitizer::resumed_fiber(self->fake_stack);
}

void start_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kReady;
    const unsigned row = i / blockDim.x;
    fiber.index = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
    sanitizer::forget_frames(fiber.stack.get(), kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

// Whether every lane of the warp barrier that `fiber` waits at has arrived there.
bool warp_barrier_complete(int index, int threads) {
  const unsigned mask = fibers[index].warp_mask;
  const int first = index / kWarpThreads * kWarpThreads;
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    if (first + lane >= threads) return false;
    const Fiber& other = fibers[first + lane];
    if (other.state != State::kAtWarpBarrier || other.warp_mask != mask) return false;
  }
  return true;
}

void release_barriers(int threads) {
  bool all_at_block_barrier = true;
  for (int i = 0; i < threads; ++i) {
    const State state = fibers[i].state;
    if (state != State::kAtBlockBarrier && state != State::kReturned) all_at_block_barrier = false;
  }
  std::vector<int> released;
  for (int i = 0; i < threads; ++i) {
    const State state = fibers[i].state;
    if (state == State::kAtBlockBarrier && all_at_block_barrier) released.push_back(i);
    if (state == State::kAtWarpBarrier && warp_barrier_complete(i, threads)) released.push_back(i);
  }
  for (int i : released) fibers[i].state = State::kReady;
}

void run_block(int threads) {
  start_block(threads);
  while (true) {
    bool progress = false;
    bool live = false;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].state == State::kReady) {
        resume(fibers[i]);
        progress = true;
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      }
      live = live || fibers[i].state != State::kReturned;
    }
    if (!live) return;
    if (!progress) throw std::runtime_error("emulator: a barrier that not all threads reach");
    release_barriers(threads);
  }
}

}  // namespace

void sync_block() { wait(State::kAtBlockBarrier); }

void sync_warp(unsigned mask) {
  require_lane(mask, lane());
  running->warp_mask = mask;
  wait(State::kAtWarpBarrier);
}

int lane() { return running_index() % kWarpThreads; }

void* dynamic_shared() { return shared_bytes; }

uint64_t* warp_slots() { return slots + running_index() / kWarpThreads * kWarpThreads; }

void require_lane(unsigned mask, int source) {
  if (source < 0 || source >= kWarpThreads || !(mask >> source & 1u)) {
    throw std::runtime_error("emulator: a lane outside the mask of a warp operation");
  }
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  static std::mutex one_grid;
  const std::lock_guard<std::mutex> lock(one_grid);
  const dim3 grid = config.gridDim;
  const dim3 block = config.blockDim;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 ||
      grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > kMaxSharedBytes) return cudaErrorInvalidValue;

  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  thread_body = &thread;
  gridDim = grid;
  blockDim = block;
  const sanitizer::Forbidden beyond(shared_bytes + config.dynamicSmemBytes,
                                    kMaxSharedBytes - config.dynamicSmemBytes);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(static_cast<int>(threads));
    }
  }
  return cudaSuccess;
}

}  // namespace emulator

// The part of the runtime's C interface that csrc/ uses: one device and no errors of its own.
extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    default:
      return "unknown";
  }
}

const char* cudaGetErrorString(cudaError_t) { return "reported by the emulator"; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
}

#include "emulator.h"

#include <ucontext.h>

#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
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

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
  bool keep;
  int group;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
  State state;
  unsigned warp_mask;   // of the warp barrier it waits at
  Operation operation;  // of that barrier, and what this lane brings to it
  Lane lane;
  std::vector<Copy> copies;  // not yet waited for, oldest first
  int open_group;
  uint3 index;
  void* fake_stack = nullptr;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;  // of the block that runs; the stacks are kept for the next one
Fiber* running;
const std::function<void()>* thread_body;
std::exception_ptr failure;
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
    fiber.copies.clear();
    fiber.open_group = 0;
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

// Runs the operation of a complete warp barrier once for all its lanes.
void run_operation(int index) {
  const unsigned mask = fibers[index].warp_mask;
  const Operation operation = fibers[index].operation;
  const int first = index / kWarpThreads * kWarpThreads;
  Lane lanes[kWarpThreads] = {};
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    if (fibers[first + lane].operation != operation) {
      throw std::runtime_error("emulator: lanes of a warp at different operations");
    }
    lanes[lane] = fibers[first + lane].lane;
  }
  if (operation) operation(lanes, mask);
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
    if (state != State::kAtWarpBarrier || !warp_barrier_complete(i, threads)) continue;
    const unsigned below = (1u << (i % kWarpThreads)) - 1;
    if (!(fibers[i].warp_mask & below)) run_operation(i);  // its first lane
    released.push_back(i);
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

void sync_warp(unsigned mask) { collective(mask, nullptr, nullptr, nullptr); }

void collective(unsigned mask, const void* input, void* output, Operation operation) {
  require_lane(mask, lane());
  running->warp_mask = mask;
  running->operation = operation;
  running->lane = {input, output};
  wait(State::kAtWarpBarrier);
}

void yield() {}

void require_aligned(const void* address, size_t bytes, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  throw std::runtime_error(std::string("emulator: a misaligned address of ") + instruction);
}

void start_copy(void* shared, const void* global, size_t bytes, bool keep) {
  require_aligned(shared, bytes, "cp.async");
  require_aligned(global, bytes, "cp.async");
  std::memset(shared, 0xff, bytes);
  running->copies.push_back({shared, global, bytes, keep, running->open_group});
}

void commit_copies() { ++running->open_group; }

void wait_copies(int pending) {
  std::vector<Copy>& copies = running->copies;
  auto next = copies.begin();
  for (; next != copies.end() && next->group < running->open_group - pending; ++next) {
    if (next->keep) std::memcpy(next->shared, next->global, next->bytes);
    if (!next->keep) std::memset(next->shared, 0, next->bytes);
  }
  copies.erase(copies.begin(), next);
}

int lane() { return running_index() % kWarpThreads; }

void* dynamic_shared() { return shared_bytes; }

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

// Kernels that want more than 48 KB of dynamic shared memory say so first.
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

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

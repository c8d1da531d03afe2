// Runs a grid: which blocks are alive, whose turn it is, and what a thread may call.
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "block.h"
#include "include/emulator.h"
#include "runtime.h"

namespace emulator {

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace {

constexpr int64_t kMaxThreads = 1024;

Turns* turns;  // of the grid that runs
const std::function<void()>* thread_body;
std::exception_ptr failure;

void thread_main() {
  try {
    (*thread_body)();
  } catch (...) {
    failure = std::current_exception();
  }
  running_block->return_thread();
}

// The blocks that are alive. Those that are not are kept for their stacks.
class Residents {
 public:
  explicit Residents(size_t dynamic_bytes) : dynamic_bytes_(dynamic_bytes) {}

  int count() const { return alive_; }

  void start(uint3 index) {
    if (static_cast<int>(blocks().size()) == alive_) blocks().push_back(std::make_unique<Block>());
    blocks()[alive_++]->start(index, blockDim, dynamic_bytes_, thread_main, *turns);
  }

  // The block that has a turn now; -1: none can run.
  int choose() const {
    int chosen = -1;
    uint64_t highest = 0;
    for (int i = 0; i < alive_; ++i) {
      const uint64_t urgency = blocks()[i]->urgency();
      if (urgency > highest) {
        highest = urgency;
        chosen = i;
      }
    }
    return chosen;
  }

  void run(int i) {
    Block& block = *blocks()[i];
    if (in_place_ != &block) {
      if (in_place_) in_place_->shared().take_away();
      block.shared().put_in_place();
      in_place_ = &block;
      blockIdx = block.index();
    }
    block.run(*turns);
    if (!block.finished()) return;
    block.shared().check_band();
    in_place_ = nullptr;
    std::swap(blocks()[i], blocks()[--alive_]);
  }

 private:
  static std::vector<std::unique_ptr<Block>>& blocks() {
    static std::vector<std::unique_ptr<Block>> kept;
    return kept;
  }

  size_t dynamic_bytes_;
  int alive_ = 0;  // the first of blocks()
  Block* in_place_ = nullptr;
};

void run_blocks(size_t dynamic_bytes) {
  Residents residents(dynamic_bytes);
  const int64_t blocks = int64_t{gridDim.x} * gridDim.y * gridDim.z;
  const std::vector<int64_t> sequence = turns->sequence(blocks);
  auto next = sequence.begin();
  while (true) {
    while (next != sequence.end() && residents.count() < turns->resident_blocks()) {
      const int64_t row = *next / gridDim.x;
      residents.start({static_cast<unsigned>(*next % gridDim.x),
                       static_cast<unsigned>(row % gridDim.y),
                       static_cast<unsigned>(row / gridDim.y)});
      ++next;
    }
    if (residents.count() == 0) return;
    const int chosen = residents.choose();
    if (chosen < 0) throw std::runtime_error("emulator: a barrier that not all threads reach");
    residents.run(chosen);
  }
}

}  // namespace

void rethrow_failure() {
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel,
                     const std::function<void()>& thread) {
  static std::mutex one_grid;
  const std::lock_guard<std::mutex> lock(one_grid);
  const dim3 grid = config.gridDim;
  const dim3 block = config.blockDim;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 ||
      grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > runtime::max_dynamic_bytes(kernel)) return cudaErrorInvalidValue;

  runtime::record_launch(kernel);
  Turns own = runtime::new_turns();
  turns = &own;
  thread_body = &thread;
  gridDim = grid;
  blockDim = block;
  run_blocks(config.dynamicSmemBytes);
  return cudaSuccess;
}

void sync_block() { running_block->wait_at_barrier(); }

void sync_warp(unsigned mask) { collective(mask, nullptr, nullptr, nullptr); }

void yield() {
  if (turns->changes(2)) running_block->yield();
}

void collective(unsigned mask, const void* input, void* output, Operation operation) {
  require_lane(mask, lane());
  running_block->join({mask, operation, {input, output}});
}

int lane() { return running->lane; }

void require_lane(unsigned mask, int source) {
  if (source < 0 || source >= kWarpThreads || !(mask >> source & 1u)) {
    throw std::runtime_error("emulator: a lane outside the mask of a warp operation");
  }
}

void require_aligned(const void* address, size_t bytes, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  throw std::runtime_error(std::string("emulator: a misaligned address of ") + instruction);
}

void* dynamic_shared() { return running_block->shared().dynamic(); }

void start_copy(void* shared, const void* global, size_t bytes, bool keep) {
  require_aligned(shared, bytes, "cp.async");
  require_aligned(global, bytes, "cp.async");
  running->copies.start(shared, global, bytes, keep);
}

void commit_copies() { running->copies.commit(); }

void wait_copies(int pending) { running->copies.wait(pending); }

}  // namespace emulator

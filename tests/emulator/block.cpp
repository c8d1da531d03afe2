#include "block.h"

#include <stdexcept>
#include <utility>

namespace emulator {

Thread* running;
Block* running_block;

namespace {

// In a random order a warp has about this many turns, and a block this many warps, in a row.
constexpr int kWarpTurns = 48;
constexpr int kBlockTurns = 6;

bool yielded;  // the thread that ran last

}  // namespace

void Block::start(uint3 index, dim3 shape, size_t dynamic_bytes, void (*body)()) {
  const int count = static_cast<int>(shape.x * shape.y * shape.z);
  index_ = index;
  if (static_cast<int>(threads_.size()) < count) threads_.resize(count);
  warps_.assign((count + kWarpThreads - 1) / kWarpThreads, Warp{0, 0, 0});
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    const unsigned row = i / shape.x;
    thread.index = {i % shape.x, row % shape.y, row / shape.y};
    thread.warp = i / kWarpThreads;
    thread.lane = i % kWarpThreads;
    thread.copies.clear();
    thread.fiber.start(body);
    warps_[thread.warp].ready |= 1u << thread.lane;
  }
  live_ = count;
  arrived_ = 0;
  shared_.allocate(dynamic_bytes);
}

bool Block::can_run() const {
  for (const Warp& warp : warps_) {
    if (warp.ready) return true;
  }
  return false;
}

void Block::run(Turns& turns) {
  const int warps = static_cast<int>(warps_.size());
  running_block = this;
  do {
    const int chosen = turns.choose(warps, [&](int i) { return warps_[i].ready != 0; });
    if (chosen < 0) return;
    Warp& warp = warps_[chosen];
    do {
      const int lane = turns.choose(kWarpThreads, [&](int i) { return warp.ready >> i & 1u; });
      running = &threads_[chosen * kWarpThreads + lane];
      threadIdx = running->index;
      running->fiber.resume();
      rethrow_failure();
    } while (warp.ready && !yielded && !turns.changes(kWarpTurns));
  } while (!turns.changes(std::exchange(yielded, false) ? 2 : kBlockTurns));
}

void Block::release_barrier() {
  if (arrived_ < live_) return;
  for (Warp& warp : warps_) {
    warp.ready |= warp.at_barrier;
    warp.at_barrier = 0;
  }
  arrived_ = 0;
}

void Block::wait_at_barrier() {
  Thread* self = running;
  Warp& warp = warps_[self->warp];
  warp.ready &= ~(1u << self->lane);
  warp.at_barrier |= 1u << self->lane;
  ++arrived_;
  release_barrier();
  self->fiber.suspend();
}

void Block::yield() {
  yielded = true;
  running->fiber.suspend();
}

void Block::return_thread() {
  warps_[running->warp].ready &= ~(1u << running->lane);
  --live_;
  release_barrier();  // threads that have returned count as arrived
}

// Runs an operation for the lanes of `mask`, all of which wait.
void Block::complete(Warp& warp, Thread* threads, unsigned mask) {
  const Operation operation = running->part.operation;
  Lane lanes[kWarpThreads] = {};
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    const Part& part = threads[lane].part;
    if (part.operation != operation || part.mask != mask) {
      throw std::runtime_error("emulator: lanes of a warp at different operations");
    }
    lanes[lane] = part.lane;
  }
  if (operation) operation(lanes, mask);
  warp.waiting &= ~mask;
  warp.ready |= mask;
}

void Block::join(const Part& part) {
  Thread* self = running;
  Warp& warp = warps_[self->warp];
  self->part = part;
  warp.ready &= ~(1u << self->lane);
  warp.waiting |= 1u << self->lane;
  if ((warp.waiting & part.mask) == part.mask) {
    complete(warp, &threads_[self->warp * kWarpThreads], part.mask);
  }
  self->fiber.suspend();
}

}  // namespace emulator

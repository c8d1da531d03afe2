#include "block.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace emulator {

Thread* running;
Block* running_block;

namespace {

// In a random order a warp has about this many turns in a row.
constexpr int kWarpTurns = 48;
// And keeps its number for about so many atomics and fences.
constexpr int kWarpYields = 4;

bool yielded;  // the thread that ran last

}  // namespace

void Block::start(uint3 index, dim3 shape, size_t dynamic_bytes, void (*body)(), Turns& turns) {
  const int count = static_cast<int>(shape.x * shape.y * shape.z);
  index_ = index;
  if (static_cast<int>(threads_.size()) < count) threads_.resize(count);
  warps_.assign((count + kWarpThreads - 1) / kWarpThreads, Warp{});
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
  for (Warp& warp : warps_) warp.number = turns.deal();
  live_ = count;
  arrived_ = 0;
  shared_.allocate(dynamic_bytes);
}

uint64_t Block::urgency() const {
  uint64_t highest = 0;
  for (const Warp& warp : warps_) {
    if (warp.ready) highest = std::max(highest, warp.number);
  }
  return highest;
}

int Block::choose_warp(Turns& turns) const {
  const uint64_t highest = turns.dealt() ? urgency() : 0;
  return turns.choose(static_cast<int>(warps_.size()), [&](int i) {
    return warps_[i].ready && (highest == 0 || warps_[i].number == highest);
  });
}

void Block::run(Turns& turns) {
  running_block = this;
  do {
    const int chosen = choose_warp(turns);
    if (chosen < 0) return;
    Warp& warp = warps_[chosen];
    do {
      running = &threads_[chosen * kWarpThreads + turns.choose_lane(warp.ready)];
      threadIdx = running->index;
      running->fiber.resume();
      rethrow_failure();
    } while (warp.ready && !yielded && !turns.changes(kWarpTurns));
    if (std::exchange(yielded, false) && turns.changes(kWarpYields)) warp.number = turns.deal();
  } while (!turns.dealt());
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

// The threads of one block that is alive, and what they wait for.
#pragma once

#include <vector>

#include "fiber.h"
#include "include/emulator.h"
#include "order.h"
#include "shared_memory.h"

namespace emulator {

constexpr int kWarpThreads = 32;

// A lane's part in the collective operation that it waits for.
struct Part {
  unsigned mask;
  Operation operation;
  Lane lane;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int warp;
  int lane;
  Part part;
  AsyncCopies copies;
};

// Sets of lanes, one bit each.
struct Warp {
  uint64_t number;  // as dealt by Turns
  unsigned ready;
  unsigned waiting;     // for a collective operation
  unsigned at_barrier;  // of the block
};

class Block {
 public:
  // Begins a block of `shape` threads, each of which will run `body`.
  void start(uint3 index, dim3 shape, size_t dynamic_bytes, void (*body)(), Turns& turns);

  // Gives turns to threads until none can go on or, if numbers were dealt, another warp may have
  // a higher one. Throws what a thread threw.
  void run(Turns& turns);

  bool finished() const { return live_ == 0; }

  // The highest number of a warp that can run; 0: none can.
  uint64_t urgency() const;
  uint3 index() const { return index_; }
  SharedMemory& shared() { return shared_; }

  // Called by the running thread.
  void yield();
  void wait_at_barrier();
  void join(const Part& part);
  void return_thread();

 private:
  int choose_warp(Turns& turns) const;
  void release_barrier();
  void complete(Warp& warp, Thread* threads, unsigned mask);

  uint3 index_;
  std::vector<Thread> threads_;  // at least as many as there are; their stacks are kept
  std::vector<Warp> warps_;
  int live_ = 0;     // threads that have not returned
  int arrived_ = 0;  // of these, at the block's barrier
  SharedMemory shared_;
};

// Throws what the running thread threw, if it did.
void rethrow_failure();

extern Thread* running;
extern Block* running_block;

}  // namespace emulator

// The order in which blocks, warps and lanes get their turn.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

// Of the values that emulator_set_order takes:
//   forward      blocks one after another; the lowest warp and lane that can run, runs
//   reverse      likewise, the highest
//   shuffled     blocks one after another in random order; any warp and lane, changing at any
//                barrier, collective operation, atomic or fence
//   interleaved  likewise, with several blocks alive at a time
enum class Order : int { kForward = 0, kReverse = 1, kShuffled = 2, kInterleaved = 3 };

class Turns {
 public:
  Turns(Order order, uint64_t seed) : order_(order), state_(seed) {}

  bool random() const { return order_ >= Order::kShuffled; }
  int resident_blocks() const { return order_ == Order::kInterleaved ? kResidentBlocks : 1; }

  // The numbers 0 to count - 1 in the order in which blocks start.
  std::vector<int64_t> sequence(int64_t count);

  // One of the candidates; `ready(i)` tells whether i is one. -1: there is none.
  template <typename Ready>
  int choose(int count, Ready ready) {
    const int start = random() ? below(count) : 0;
    for (int i = 0; i < count; ++i) {
      const int step = order_ == Order::kReverse ? count - 1 - i : (start + i) % count;
      if (ready(step)) return step;
    }
    return -1;
  }

  // Whether a random order changes its mind, once in about `rarity` calls.
  bool changes(int rarity) { return random() && below(rarity) == 0; }

 private:
  // Blocks that are alive together: enough for several groups of blocks that reduce together.
  static constexpr int kResidentBlocks = 24;

  int below(int count);

  Order order_;
  uint64_t state_;
};

}  // namespace emulator

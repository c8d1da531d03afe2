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
//   interleaved  several blocks alive at a time; of all warps that can run the one that was dealt
//                the highest number goes on, so that low ones fall behind as far as barriers allow;
//                numbers are dealt anew now and then at an atomic or fence
enum class Order : int { kForward = 0, kReverse = 1, kShuffled = 2, kInterleaved = 3 };

class Turns {
 public:
  Turns(Order order, uint64_t seed) : order_(order), state_(seed) {}

  bool random() const { return order_ >= Order::kShuffled; }
  int resident_blocks() const { return order_ == Order::kInterleaved ? kResidentBlocks : 1; }

  // The numbers 0 to count - 1 in the order in which blocks start.
  std::vector<int64_t> sequence(int64_t count);

  // Whether warps take turns by the numbers they were dealt, and such a number, never 0.
  bool dealt() const { return order_ == Order::kInterleaved; }
  uint64_t deal() { return next() | 1; }

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

  // The same of a set of lanes, one bit each, that is not empty.
  int choose_lane(unsigned lanes) {
    if (order_ == Order::kReverse) return 31 - __builtin_clz(lanes);
    const int start = random() ? below(32) : 0;
    const unsigned from_start = lanes >> start << start;
    return __builtin_ctz(from_start ? from_start : lanes);
  }

  // Whether a random order changes its mind, once in about `rarity` calls.
  bool changes(int rarity) { return random() && below(rarity) == 0; }

 private:
  // Blocks that are alive together: enough for several groups of blocks that reduce together.
  static constexpr int kResidentBlocks = 24;

  uint64_t next();
  int below(int count) { return static_cast<int>(next() % static_cast<uint64_t>(count)); }

  Order order_;
  uint64_t state_;
};

}  // namespace emulator

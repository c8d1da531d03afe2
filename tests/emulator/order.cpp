#include "order.h"

#include <numeric>
#include <utility>

namespace emulator {

// splitmix64, so that a seed means the same order everywhere.
uint64_t Turns::next() {
  uint64_t value = state_ += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

std::vector<int64_t> Turns::sequence(int64_t count) {
  std::vector<int64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  for (int64_t i = count - 1; i > 0; --i) {
    if (order_ == Order::kReverse && i < count - 1 - i) break;
    const int64_t other = order_ == Order::kReverse ? count - 1 - i
                          : random()                ? below(static_cast<int>(i + 1))
                                                    : i;
    std::swap(numbers[i], numbers[other]);
  }
  return numbers;
}

}  // namespace emulator

// Shared memory of the blocks that are alive, and the asynchronous copies on their way to it.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "sanitizer.h"

namespace emulator {

// Fresh shared memory reads as NaN in every floating-point format, as -1 in integers.
constexpr unsigned char kPoison = 0xff;

// A block's shared memory. Variables declared __shared__ have one address for all blocks: their
// contents are swapped when another block runs.
class SharedMemory {
 public:
  // For a new block: poison everywhere. No other block's memory may be in place.
  void allocate(size_t dynamic_bytes);

  void put_in_place();
  void take_away();

  void* dynamic() { return begin_; }

  // Throws std::runtime_error if something was written behind the dynamic shared memory.
  void check_band() const;

  static size_t static_bytes();

 private:
  static constexpr size_t kBandBytes = 1024;
  static constexpr size_t kAlignment = 128;
  std::vector<unsigned char> buffer_;
  unsigned char* begin_ = nullptr;
  unsigned char* end_ = nullptr;
  std::unique_ptr<sanitizer::Forbidden> band_;
  std::vector<unsigned char> statics_;  // while another block's are in place
};

// The copies of one thread that it has not waited for.
class AsyncCopies {
 public:
  void clear();
  void start(void* shared, const void* global, size_t bytes, bool keep);
  void commit() { ++open_group_; }
  void wait(int pending);

 private:
  struct Copy {
    void* shared;
    const void* global;
    size_t bytes;
    bool keep;
    int group;
  };
  std::vector<Copy> copies_;  // oldest first
  int open_group_ = 0;
};

}  // namespace emulator

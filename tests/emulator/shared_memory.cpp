#include "shared_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

// Where shared_memory.ld puts the variables declared __shared__.
extern "C" {
extern unsigned char emulator_shared_begin[];
extern unsigned char emulator_shared_end[];
}

namespace emulator {
namespace {

// AddressSanitizer keeps red zones between the variables, which memcpy would not cross; `volatile`
// keeps the compiler from making a memcpy of the loop.
__attribute__((no_sanitize("address"))) void copy_statics(volatile unsigned char* to,
                                                          const volatile unsigned char* from) {
  for (size_t i = 0; i < SharedMemory::static_bytes(); ++i) to[i] = from[i];
}

}  // namespace

size_t SharedMemory::static_bytes() { return emulator_shared_end - emulator_shared_begin; }

void SharedMemory::allocate(size_t dynamic_bytes) {
  band_.reset();
  statics_.assign(static_bytes(), kPoison);
  buffer_.assign(dynamic_bytes + kBandBytes + kAlignment, kPoison);
  const auto address = reinterpret_cast<uintptr_t>(buffer_.data());
  begin_ = buffer_.data() + (kAlignment - address % kAlignment) % kAlignment;
  end_ = begin_ + dynamic_bytes;
  band_ = std::make_unique<sanitizer::Forbidden>(end_, kBandBytes);
}

void SharedMemory::put_in_place() { copy_statics(emulator_shared_begin, statics_.data()); }

void SharedMemory::take_away() { copy_statics(statics_.data(), emulator_shared_begin); }

__attribute__((no_sanitize("address"))) void SharedMemory::check_band() const {
  for (const volatile unsigned char* byte = end_; byte != end_ + kBandBytes; ++byte) {
    if (*byte != kPoison) {
      throw std::runtime_error("emulator: a write behind the end of dynamic shared memory");
    }
  }
}

void AsyncCopies::clear() {
  copies_.clear();
  open_group_ = 0;
}

void AsyncCopies::start(void* shared, const void* global, size_t bytes, bool keep) {
  // A copy may land at any time from now on: until it does, nothing may be read here.
  std::memset(shared, kPoison, bytes);
  copies_.push_back({shared, global, bytes, keep, open_group_});
}

void AsyncCopies::wait(int pending) {
  const auto waited = [&](const Copy& copy) { return copy.group < open_group_ - pending; };
  const auto last = std::find_if_not(copies_.begin(), copies_.end(), waited);
  for (auto copy = copies_.begin(); copy != last; ++copy) {
    if (copy->keep) {
      std::memcpy(copy->shared, copy->global, copy->bytes);
    } else {
      std::memset(copy->shared, 0, copy->bytes);
    }
  }
  copies_.erase(copies_.begin(), last);
}

}  // namespace emulator

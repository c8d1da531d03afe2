// Where the rows of a rolling cache lie, and their widening to float.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/simd.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

// Calls run(T{}) with the storage type of a quantised cache, `plain` for any other.
template <typename Run, typename Plain>
inline void with_quantised(Dtype dtype, Run&& run, Plain&& plain) {
  switch (dtype) {
    case Dtype::kInt8:
      return run(Int8{});
    case Dtype::kFloat8:
      return run(Float8{});
    default:
      return plain();
  }
}

// Calls run(T{}) with the storage type of any dtype that a cache may have.
template <typename Run>
inline void with_cache_dtype(Dtype dtype, Run&& run) {
  with_quantised(dtype, run, [&] { with_dtype(dtype, run); });
}

// Calls run(Cache{}) with the storage type of a cache for inputs of type T: theirs, or quantised.
template <typename T, typename Run>
inline void with_cache_of(Dtype dtype, Run&& run) {
  with_quantised(dtype, run, [&] { run(T{}); });
}

// Calls run(row, first, count) for each contiguous run of positions first..end-1 of a sequence and
// head: `row` is where position `first` lies; `count` more rows follow at pages.stride_row. A run
// ends with its page, and so where the ring wraps.
template <typename T, typename Run>
inline void for_runs(const Ring& ring, const Pages& pages, int64_t sequence, int64_t head,
                     int64_t first, int64_t end, Run&& run) {
  const int64_t capacity = ring.pages_per_seq * ring.page_size;
  const int32_t* table = ring.block_table + sequence * ring.stride_table;
  while (first < end) {
    const int64_t slot = first % capacity;
    const int64_t row = slot % ring.page_size;
    const int64_t count = std::min(end - first, ring.page_size - row);
    T* data = static_cast<T*>(pages.data) + table[slot / ring.page_size] * pages.stride_page +
              row * pages.stride_row + head * pages.stride_head;
    run(data, first, count);
    first += count;
  }
}

// Stores a row of a new key or value: its very bits, or value / scale, rounded and saturating.
template <typename T, typename Cache>
inline void write_row(const T* from, Cache* to, int64_t head_dim, float scale) {
  if constexpr (std::is_same_v<T, Cache>) {
    std::memcpy(to, from, head_dim * sizeof(T));
  } else {
    for (int64_t i = 0; i < head_dim; ++i) to[i] = from_float<Cache>(to_float(from[i]) / scale);
  }
}

inline float scale_of(const Pages& pages, int64_t head) {
  return pages.scale == nullptr ? 1.0f : pages.scale[head * pages.stride_scale];
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// 16-byte vectors: the widest access of one thread, and the only way kernels touch rows in memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace mistral_kernels::cuda {

// kWidth elements of T in registers.
template <typename T>
struct Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T values[kWidth];
};

// Whether every row of a (rows, columns) tensor consists of whole vectors on 16-byte boundaries.
template <typename T>
bool rows_are_vectors(const void* data, int64_t columns, int64_t stride_row) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns % Vector<T>::kWidth == 0 &&
         stride_row % Vector<T>::kWidth == 0;
}

// kWhole: one 128-bit access, `from` on a 16-byte boundary. Otherwise element by element, the first
// `count` elements only and the rest 0: the same values in the same registers either way.
template <bool kWhole, typename T>
__device__ Vector<T> load_vector(const T* from, int64_t count) {
  Vector<T> vector;
  if constexpr (kWhole) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(&vector, &raw, sizeof(raw));
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kWidth; ++i) vector.values[i] = i < count ? from[i] : T(0.0f);
  }
  return vector;
}

template <bool kWhole, typename T>
__device__ void store_vector(T* to, const Vector<T>& vector, int64_t count) {
  if constexpr (kWhole) {
    uint4 raw;
    memcpy(&raw, &vector, sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kWidth; ++i) {
      if (i < count) to[i] = vector.values[i];
    }
  }
}

}  // namespace mistral_kernels::cuda

// Vectors of up to 16 bytes, the widest access of one thread; the only way kernels touch rows in
// memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mistral_kernels::cuda {

// kWidth elements of T in registers: 16 bytes of them unless said otherwise.
template <typename T, int kElements = 16 / sizeof(T)>
struct Vector {
  static constexpr int kWidth = kElements;
  T values[kWidth];
};

// What one instruction moves a vector as.
template <typename V>
using Packed =
    std::conditional_t<sizeof(V) == 16, uint4, std::conditional_t<sizeof(V) == 8, uint2, uint32_t>>;

// Whether every row of a (..., columns) tensor consists of whole vectors on boundaries of theirs.
template <typename T, int kWidth = Vector<T>::kWidth, typename... Strides>
bool rows_are_vectors(const void* data, int64_t columns, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % (kWidth * sizeof(T)) == 0 && columns % kWidth == 0 &&
         ((strides % kWidth == 0) && ...);
}

// kWhole: one access, `from` on a boundary of the vector's size. Otherwise element by element, the
// first `count` elements only and the rest 0: the same values in the same registers either way.
template <bool kWhole, typename T, int kWidth = Vector<T>::kWidth>
__device__ Vector<T, kWidth> load_vector(const T* from, int64_t count) {
  Vector<T, kWidth> vector;
  if constexpr (kWhole) {
    using Raw = Packed<Vector<T, kWidth>>;
    static_assert(sizeof(Raw) == sizeof(vector), "vectors have 4, 8 or 16 bytes");
    const Raw raw = *reinterpret_cast<const Raw*>(from);
    memcpy(&vector, &raw, sizeof(raw));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) vector.values[i] = i < count ? from[i] : T(0.0f);
  }
  return vector;
}

template <bool kWhole, typename T, int kWidth>
__device__ void store_vector(T* to, const Vector<T, kWidth>& vector, int64_t count) {
  if constexpr (kWhole) {
    using Raw = Packed<Vector<T, kWidth>>;
    static_assert(sizeof(Raw) == sizeof(vector), "vectors have 4, 8 or 16 bytes");
    Raw raw;
    memcpy(&raw, &vector, sizeof(raw));
    *reinterpret_cast<Raw*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) to[i] = vector.values[i];
    }
  }
}

}  // namespace mistral_kernels::cuda

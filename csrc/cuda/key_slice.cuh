// What one warp does with a slice of 16 keys: copies it to shared memory, scores and weighs it,
// adds its values, on tensor cores.
//
// Keys are the 16 rows of an mma and heads its 8 columns, for scores (keys x heads) as for values
// (head_dim x heads): groups are of 8 heads at most, and with heads as rows half of each product
// and half of the sums' registers would be padding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/cache_codes.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "cuda/softmax_parts.cuh"

namespace mistral_kernels::cuda {

constexpr int kSliceKeys = 16;
constexpr int kHeads = 8;
constexpr int kChunkBytes = 16;  // of one copy

// A slice of rows of kHeadDim elements in shared memory. Chunks of a row change places by its
// number, so that the 8 rows of a matrix that ldmatrix reads together lie in different banks.
template <typename Cache, int kHeadDim>
struct KeySlice {
  static constexpr int kRowBytes = kHeadDim * sizeof(Cache);
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kBytes = kSliceKeys * kRowBytes;
  static constexpr int kRowsPerLine = kChunks < 8 ? 8 / kChunks : 1;  // lines of 128 bytes
  static_assert(kRowBytes % kChunkBytes == 0 && (kChunks & (kChunks - 1)) == 0, "whole chunks");

  __device__ static int offset(int row, int chunk) {
    const int turn = row / kRowsPerLine % (kChunks < 8 ? kChunks : 8);
    return row * kRowBytes + (chunk ^ turn) * kChunkBytes;
  }
};

// Starts the copies of the rows i of a slice for which 0 <= i + ahead < count; the others become
// zeros, and so does what lies behind `row_bytes`. `from` is the slice's first row.
template <typename Slice>
__device__ void copy_slice(char* slice, const char* from, int64_t stride_row_bytes, int row_bytes,
                           int ahead, int count) {
  static_assert(Slice::kChunks <= kWarpThreads, "a lane copies one column of chunks");
  constexpr int kRows = kWarpThreads / Slice::kChunks;  // at a time
  const int lane = threadIdx.x % kWarpThreads;
  const int chunk = lane % Slice::kChunks;
  const bool inside = chunk * kChunkBytes < row_bytes;
  const auto kept = static_cast<unsigned>(inside ? max(count, 0) : 0);
  from += lane / Slice::kChunks * stride_row_bytes + (inside ? chunk * kChunkBytes : 0);
#pragma unroll
  for (int i = 0; i < kSliceKeys; i += kRows) {
    const int row = i + lane / Slice::kChunks;
    copy_async_16(slice + Slice::offset(row, chunk), from,
                  static_cast<unsigned>(row + ahead) < kept);
    from += kRows * stride_row_bytes;
  }
}

// Puts one row into a slice that has landed.
template <typename Slice, typename Cache>
__device__ void put_row(char* slice, int row, const Cache* from) {
  const auto* chunks = reinterpret_cast<const uint4*>(from);
  for (int chunk = threadIdx.x % kWarpThreads; chunk < Slice::kChunks; chunk += kWarpThreads) {
    *reinterpret_cast<uint4*>(slice + Slice::offset(row, chunk)) = chunks[chunk];
  }
}

// The operand b of scores: lane's elements of the queries (kHeads, kHeadDim) in shared memory,
// those of heads and dimensions that are not there 0. Step s takes 16 dimensions; in which order
// does not matter as long as keys come in the same: that of load_matrix_4, or of its bytes.
template <typename T, typename Cache, int kHeadDim>
__device__ void load_queries(uint32_t (&q)[kHeadDim / 16][2], const T* queries, int heads,
                             int head_dim) {
  const int head = threadIdx.x % kWarpThreads / 4;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = 16 * step + (kIsQuantised<Cache> ? 4 * t + i : 2 * t + 8 * i);
      const int high = low + (kIsQuantised<Cache> ? 2 : 1);
      const T* row = queries + head * kHeadDim;
      const bool there = head < heads && low < head_dim;
      q[step][i] = there ? packed<T>(to_float(row[low]), to_float(row[high])) : 0u;
    }
  }
}

// scores[0, 1]: key lane / 4, heads 2 * (lane % 4) and the next; scores[2, 3]: key lane / 4 + 8.
template <typename T, typename Cache, int kHeadDim>
__device__ void score_slice(float (&scores)[4], const char* slice,
                            const uint32_t (&q)[kHeadDim / 16][2]) {
  using Slice = KeySlice<Cache, kHeadDim>;
  const int lane = threadIdx.x % kWarpThreads;
  float sums[2][4] = {};  // two chains of products, half as long
#pragma unroll
  for (int chunk = 0; chunk < Slice::kChunks; chunk += 2) {
    uint32_t keys[4];
    load_matrix_4(keys, slice + Slice::offset(lane % 16, chunk + lane / 16));
    if constexpr (kIsQuantised<Cache>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t (&two)[2] = {keys[2 * i], keys[2 * i + 1]};
        const uint32_t a[4] = {widened<T, Cache, false>(two[0]), widened<T, Cache, false>(two[1]),
                               widened<T, Cache, true>(two[0]), widened<T, Cache, true>(two[1])};
        mma_16x8x16<T>(sums[i], a, q[chunk + i]);
      }
    } else {
      mma_16x8x16<T>(sums[chunk / 2 % 2], keys, q[chunk / 2]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = sums[0][i] + sums[1][i];
}

// The running softmax of one warp: of lane, heads 2 * (lane % 4) and the next.
template <int kHeadDim>
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  float sums[kHeadDim / 16][4] = {};

  // Turns the scores of keys `key` and key + 8 into weights.
  __device__ void weigh(float (&scores)[4], float scale, int key, int first, int position) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = key + 8 * (i / 2);
      scores[i] = own >= first && own <= position ? scores[i] * scale : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float larger = fmaxf(scores[i], scores[i + 2]);
#pragma unroll
      for (int offset = 4; offset < kWarpThreads; offset *= 2) {
        larger = fmaxf(larger, __shfl_xor_sync(kAllLanes, larger, offset));
      }
      larger = fmaxf(top[i], larger);
      const float keep = exp2f(top[i] - base_of(larger));
      top[i] = larger;
      scores[i] = exp2f(scores[i] - base_of(larger));
      scores[i + 2] = exp2f(scores[i + 2] - base_of(larger));
      total[i] = total[i] * keep + (scores[i] + scores[i + 2]);
#pragma unroll
      for (auto& tile : sums) {
        tile[i] *= keep;
        tile[i + 2] *= keep;
      }
    }
  }
};

// Rows 2t, 2t + 1 of column g of the 8 x 8 matrix of which lane 4g + t holds row g, columns 2t and
// 2t + 1.
__device__ inline uint32_t transposed(uint32_t pair) {
  const int g = threadIdx.x % kWarpThreads / 4;
  const int t = threadIdx.x % 4;
  const uint32_t low = __shfl_sync(kAllLanes, pair, 8 * t + g / 2);
  const uint32_t high = __shfl_sync(kAllLanes, pair, 8 * t + 4 + g / 2);
  return g % 2 == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
}

// sums += values * weights, where lane holds weights as score_slice leaves scores, and of tile i of
// `sums` dimensions `first` and `second` of sum_dims, heads 2 * (lane % 4) and the next.
template <typename T, typename Cache, int kHeadDim>
__device__ void add_slice(float (&sums)[kHeadDim / 16][4], const char* slice,
                          const float (&weights)[4]) {
  using Slice = KeySlice<Cache, kHeadDim>;
  const int lane = threadIdx.x % kWarpThreads;
  // fp16 holds every code and takes fewest instructions to make; weights are 1 at most, so what it
  // loses of the least, 2^-25, is nothing beside the rounding of T.
  using V = std::conditional_t<kIsQuantised<Cache>, __half, T>;
  const uint32_t b[2] = {transposed(packed<V>(weights[0], weights[1])),
                         transposed(packed<V>(weights[2], weights[3]))};
#pragma unroll
  for (int chunk = 0; chunk < Slice::kChunks; chunk += 2) {
    uint32_t values[4];  // keys 0-7 and 8-15 of one chunk, then of the next
    load_matrix_4_transposed(values, slice + Slice::offset(lane % 16, chunk + lane / 16));
    if constexpr (kIsQuantised<Cache>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t (&two)[2] = {values[2 * i], values[2 * i + 1]};
        const uint32_t a[4] = {widened<V, Cache, false>(two[0]), widened<V, Cache, true>(two[0]),
                               widened<V, Cache, false>(two[1]), widened<V, Cache, true>(two[1])};
        mma_16x8x16<V>(sums[chunk + i], a, b);
      }
    } else {
      const uint32_t a[4] = {values[0], values[2], values[1], values[3]};
      mma_16x8x16<V>(sums[chunk / 2], a, b);
    }
  }
}

// The dimension of sums[tile][0, 1] (half 0) and of sums[tile][2, 3] (half 1): bytes are transposed
// in pairs, so that neighbours share a lane.
template <typename Cache>
__device__ int dimension_of(int tile, int half) {
  const int g = threadIdx.x % kWarpThreads / 4;
  return 16 * tile + (kIsQuantised<Cache> ? 2 * g + half : g + 8 * half);
}

}  // namespace mistral_kernels::cuda

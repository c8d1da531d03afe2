// Sums over the warps of a block that share k. A warp has those of 16 weight rows and of tiles of 8
// tokens, as an mma leaves them (mma.cuh).
#pragma once

#include <cuda_runtime.h>

namespace mistral_kernels::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;       // weight rows of a warp: those of an mma's a
constexpr int kTileTokens = 8;  // tokens of an mma's b; CUDA_ROWS of ops/low_bit.py

// Writes a warp's sums to `partial`, (pairs, kWarps, kRows) in shared memory. The pair of a token
// is a number of the caller's, negative where nobody wants its sums.
template <int kTiles, typename PairOf>
__device__ void put_partial(const float (&sums)[kTiles][4], PairOf pair_of, float* partial) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int pair = pair_of(i * kTileTokens + lane % 4 * 2 + j);
      if (pair < 0) continue;
      float* to = partial + (pair * kWarps + warp) * kRows + lane / 4;
      to[0] = sums[i][j];
      to[8] = sums[i][2 + j];
    }
  }
}

// The sum of a pair's `row` over the kCount warps from `first` on, in their order.
template <int kCount>
__device__ float add_partial(const float* partial, int pair, int first, int row) {
  const float* from = partial + (pair * kWarps + first) * kRows + row;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += from[i * kRows];
  return sum;
}

}  // namespace mistral_kernels::cuda

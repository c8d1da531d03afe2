// Softmaxes over parts of the keys, brought to one: the warps of a block, then the splits of a
// sequence. A part of a head is its largest score (a power of 2), its sum of weights and its
// weighted values, all float. Parts are added in their order, whichever finished last.
#pragma once

#include <cuda_runtime.h>

#include "cuda/reduce.cuh"

namespace mistral_kernels::cuda {

// The score that weights are taken from: scores that are all -inf would give -inf - -inf, a NaN.
__device__ inline float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

// In shared memory, of one block.
template <int kMaxParts, int kMaxHeads>
struct SoftmaxParts {
  float tops[kMaxParts][kMaxHeads];  // largest scores; then shares, what the part's sums count
  float totals[kMaxParts][kMaxHeads];
  float top[kMaxHeads];  // of all parts
  float total[kMaxHeads];
};

// Turns tops into shares and fills in top and total, a warp a head. Wants a barrier before and
// after.
template <int kWarps, typename Parts>
__device__ void weigh_parts(Parts& all, int parts, int heads) {
  const int lane = threadIdx.x % kWarpThreads;
  for (int head = threadIdx.x / kWarpThreads; head < heads; head += kWarps) {
    float top = -INFINITY;
    for (int part = lane; part < parts; part += kWarpThreads) {
      top = fmaxf(top, all.tops[part][head]);
    }
    top = warp_max(top);
    float total = 0.0f;
    for (int part = lane; part < parts; part += kWarpThreads) {
      const float share = exp2f(all.tops[part][head] - base_of(top));
      total += share * all.totals[part][head];
      all.tops[part][head] = share;
    }
    total = warp_sum(total);
    if (lane == 0) {
      all.top[head] = top;
      all.total[head] = total;
    }
  }
}

// The sum over parts of the shares times `load(part)`, four neighbours of a head's values.
template <typename Parts, typename Load>
__device__ float4 add_parts(const Parts& all, int parts, int head, Load load) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
    const float share = all.tops[part][head];
    const float4 values = load(part);
    sum.x += share * values.x;
    sum.y += share * values.y;
    sum.z += share * values.z;
    sum.w += share * values.w;
  }
  return sum;
}

// Calls store(head, column, sum) for all groups of four neighbours of the heads' values, each the
// sum over parts of what `load` returns times its share.
template <int kWarps, typename Parts, typename Load, typename Store>
__device__ void merge_parts(Parts& all, int parts, int heads, int head_dim, Load load,
                            Store store) {
  __syncthreads();
  weigh_parts<kWarps>(all, parts, heads);
  __syncthreads();
  const int columns = head_dim / 4;
  for (int i = threadIdx.x; i < heads * columns; i += kWarps * kWarpThreads) {
    const int head = i / columns;
    const int column = i % columns * 4;
    store(head, column,
          add_parts(all, parts, head, [=](int part) { return load(part, head, column); }));
  }
}

}  // namespace mistral_kernels::cuda

// What follows the sums of an expert's rows, whatever format these have: SwiGLU, and the
// combination of a token's slots.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/convert.cuh"
#include "cuda/expert_choice.cuh"
#include "cuda/row_sums.cuh"

namespace mistral_kernels::cuda {

constexpr int kColumns = 16;  // what a block computes of ffn_dim (up), of hidden (down)
constexpr int kUpShares = 4;  // warps that share k in up: two groups of 8 columns, gate and up rows

// In up, a warp's 16 rows are gate and up of 8 columns. Each thread writes one of a block's columns
// from `first_column` on, of one token, to `inner`, (pairs, ffn_dim).
template <typename T>
__device__ void store_swiglu(const float* partial, const ExpertChoice& choice, int expert,
                             int first_column, int ffn_dim, T* inner) {
  const int own = threadIdx.x % kColumns;
  const int pair = choice.pair_of(threadIdx.x / kColumns, expert);
  if (pair < 0 || first_column + own >= ffn_dim) return;
  const int first_warp = own / 8 * kUpShares;
  const float gate = add_partial<kUpShares>(partial, pair, first_warp, own % 8);
  const float up = add_partial<kUpShares>(partial, pair, first_warp, own % 8 + 8);
  inner[static_cast<int64_t>(pair) * ffn_dim + first_column + own] =
      from_float<T>(gate / (1.0f + expf(-gate)) * up);
}

// In down, a warp's 16 rows are 16 columns of out. Each thread writes one of them, of one token, to
// `out`, (tokens, hidden): the sum of the token's slots, in their order.
template <typename T>
__device__ void store_combined(const float* partial, const ExpertChoice& choice,
                               const float* weights, int64_t stride_weights_token, int first_column,
                               int hidden, T* out) {
  const int own = threadIdx.x % kColumns;
  const int token = threadIdx.x / kColumns;
  const int top_k = choice.top_k;
  if (token >= choice.tokens || first_column + own >= hidden) return;
  float total = 0.0f;
  for (int slot = 0; slot < top_k; ++slot) {
    const int expert = choice.ids[token * top_k + slot];
    if (expert < 0) continue;
    const int pair = choice.pair_of(token, expert);
    total +=
        weights[token * stride_weights_token + slot] * add_partial<kWarps>(partial, pair, 0, own);
  }
  out[static_cast<int64_t>(token) * hidden + first_column + own] = from_float<T>(total);
}

}  // namespace mistral_kernels::cuda

// Which experts few tokens chose, found by each block for itself: nothing is sorted beforehand.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mistral_kernels::cuda {

// A pair is (token, slot), numbered token * top_k + slot.
struct ExpertChoice {
  const int* ids;  // (tokens * top_k,), shared memory: -1 where the slot is skipped
  int tokens;
  int top_k;
  int experts;

  // Fills `shared` with the ids.
  __device__ ExpertChoice(const int32_t* expert_ids, int64_t stride_token, int tokens, int top_k,
                          int experts, int* shared)
      : ids(shared), tokens(tokens), top_k(top_k), experts(experts) {
    const int pair = threadIdx.x;
    if (pair < tokens * top_k) {
      const int id = expert_ids[pair / top_k * stride_token + pair % top_k];
      shared[pair] = id >= 0 && id < experts ? id : -1;
    }
    __syncthreads();
  }

  // The first pair of `token` that chose `expert`, or -1. Where a token chose it twice, the second
  // slot uses what was computed for the first.
  __device__ int pair_of(int token, int expert) const {
    if (token >= tokens) return -1;
    for (int pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
      if (ids[pair] == expert) return pair;
    }
    return -1;
  }

  // Each used expert is that of one candidate out of `candidates`; the others have none, -1. With
  // fewer pairs than experts a candidate is a pair, else an expert. Ids 5, 2, 5, -1 of 8 experts
  // give 5, 2, -1, -1; of 3 experts, ids 2, -1, 0, 2 give 0, -1, 2.
  __device__ int expert_of(int candidate) const {
    const int pairs = tokens * top_k;
    const bool is_pair = pairs < experts;
    const int expert = is_pair ? ids[candidate] : candidate;
    bool chosen = false;  // by the pairs before the candidate, by any pair
    for (int pair = 0; pair < (is_pair ? candidate : pairs); ++pair) {
      chosen = chosen || ids[pair] == expert;
    }
    return chosen == is_pair ? -1 : expert;
  }
};

// What expert_of can be asked for.
__host__ __device__ inline int candidates(int pairs, int experts) {
  return pairs < experts ? pairs : experts;
}

}  // namespace mistral_kernels::cuda

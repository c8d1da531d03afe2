// route_experts on the CPU.
//
// A token costs experts * itemsize + 8 * top_k bytes and top_k passes over its logits, which lie in
// L1. Experts are few: beside the GEMM that makes the logits this is nothing, so simple it is.
#include <cmath>

#include "cpu/dispatch.h"
#include "expert_rank.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

// Chooses one token's experts in falling rank. The last rank is all that has to be remembered of
// those taken before, so no buffer bounds experts or top_k.
template <typename T>
void choose_experts(const T* logits, int64_t experts, int64_t top_k, int32_t* expert_ids) {
  uint64_t last = ~uint64_t{0};
  for (int64_t slot = 0; slot < top_k; ++slot) {
    uint64_t best = 0;
    for (int64_t expert = 0; expert < experts; ++expert) {
      const uint64_t found = rank_of(to_float(logits[expert]), static_cast<uint32_t>(expert));
      const uint64_t left = found < last ? found : 0;  // selects: a branch would be a coin's toss
      best = left > best ? left : best;
    }
    expert_ids[slot] = static_cast<int32_t>(expert_of(best));
    last = best;
  }
}

// The softmax over the chosen logits. The first is the largest, or NaN, and NaN spreads.
template <typename T>
void weigh_experts(const T* logits, int64_t top_k, const int32_t* expert_ids, float* weights) {
  const float largest = to_float(logits[expert_ids[0]]);
  float total = 0.0f;
  for (int64_t slot = 0; slot < top_k; ++slot) {
    weights[slot] = std::exp(to_float(logits[expert_ids[slot]]) - largest);
    total += weights[slot];
  }
  for (int64_t slot = 0; slot < top_k; ++slot) weights[slot] /= total;
}

template <typename T>
void route_tokens(const RouteExperts& args, int threads) {
  const int64_t visits = args.tokens * args.experts * args.top_k;
#pragma omp parallel for schedule(static) num_threads(team(threads, visits))
  for (int64_t token = 0; token < args.tokens; ++token) {
    const T* logits = static_cast<const T*>(args.logits) + token * args.stride_token;
    float* weights = args.weights + token * args.top_k;
    int32_t* expert_ids = args.expert_ids + token * args.top_k;
    if (args.positions != nullptr && args.positions[token] < 0) {
      for (int64_t slot = 0; slot < args.top_k; ++slot) {
        weights[slot] = 0.0f;
        expert_ids[slot] = -1;
      }
      continue;
    }
    choose_experts(logits, args.experts, args.top_k, expert_ids);
    weigh_experts(logits, args.top_k, expert_ids, weights);
  }
}

}  // namespace

void route_experts(const RouteExperts& args, int threads) {
  with_dtype(args.dtype, [&](auto element) { route_tokens<decltype(element)>(args, threads); });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

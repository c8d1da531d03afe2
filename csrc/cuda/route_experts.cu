// route_experts on CUDA: one warp a token.
//
// A token moves experts * itemsize + 8 * top_k bytes and takes top_k passes over its logits, of
// which all but the first find them in L1. 4096 tokens of 8 experts, top-2, in bf16 are 131 KB:
// predicted are 2 us on A100, H100 and H200 alike, the latency of a launch, of a load and of ten
// shuffles a pass; its time is not measured.
#include "cuda/convert.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "expert_rank.h"
#include "launchers.h"

namespace mistral_kernels::cuda {
namespace {

constexpr int kThreads = 128;  // four tokens a block; not measured
constexpr int kTokens = kThreads / kWarpThreads;

// Grid (cdiv(tokens, kTokens)). A warp owns one token, a lane every 32nd expert and, of the
// results, every 32nd slot.
// codegen: route_experts_kernel moves 131e3 bytes, does 655e3 operations for 4096 tokens
template <typename T>
__global__ void __launch_bounds__(kThreads)
    route_experts_kernel(const T* __restrict__ logits,           // (tokens, experts)
                         const int32_t* __restrict__ positions,  // (tokens,) or null
                         float* __restrict__ weights,            // (tokens, top_k)
                         int32_t* __restrict__ expert_ids,       // (tokens, top_k)
                         int64_t tokens, int experts, int top_k, int64_t stride_token) {
  const int64_t token = int64_t{blockIdx.x} * kTokens + threadIdx.x / kWarpThreads;
  const int lane = threadIdx.x % kWarpThreads;
  if (token >= tokens) return;  // whole warps leave, so those that stay may shuffle
  logits += token * stride_token;
  weights += token * top_k;
  expert_ids += token * top_k;
  if (positions != nullptr && positions[token] < 0) {
    for (int slot = lane; slot < top_k; slot += kWarpThreads) {
      weights[slot] = 0.0f;
      expert_ids[slot] = -1;
    }
    return;
  }

  // Experts in falling rank. The last rank is all that has to be remembered of those taken before,
  // so no buffer bounds experts or top_k. The first logit is the largest, or NaN, and NaN spreads.
  uint64_t last = ~uint64_t{0};
  float largest = 0.0f;
  float total = 0.0f;
  for (int slot = 0; slot < top_k; ++slot) {
    uint64_t best = 0;
    for (int expert = lane; expert < experts; expert += kWarpThreads) {
      const uint64_t rank = rank_of(to_float(logits[expert]), static_cast<uint32_t>(expert));
      if (rank < last && rank > best) best = rank;
    }
    last = warp_max(best);
    const int expert = static_cast<int>(expert_of(last));
    const float logit = to_float(logits[expert]);
    if (slot == 0) largest = logit;
    if (slot % kWarpThreads != lane) continue;
    const float share = expf(logit - largest);
    expert_ids[slot] = expert;
    weights[slot] = share;
    total += share;
  }

  // Each lane reads back only what it wrote itself, so `weights` needs no fence.
  total = warp_sum(total);
  for (int slot = lane; slot < top_k; slot += kWarpThreads) weights[slot] /= total;
}

template <typename T>
void launch_route_experts(const RouteExperts& args, void* stream) {
  const int64_t blocks = (args.tokens + kTokens - 1) / kTokens;
  launch("route_experts", route_experts_kernel<T>, dim3(static_cast<unsigned>(blocks)),
         dim3(kThreads), 0, stream, static_cast<const T*>(args.logits), args.positions,
         args.weights, args.expert_ids, args.tokens, static_cast<int>(args.experts),
         static_cast<int>(args.top_k), args.stride_token);
}

}  // namespace

void route_experts(const RouteExperts& args, int device, void* stream) {
  if (args.tokens == 0) return;
  const DeviceGuard guard(device, "route_experts");
  with_dtype("route_experts", args.dtype,
             [&](auto element) { launch_route_experts<decltype(element)>(args, stream); });
}

}  // namespace mistral_kernels::cuda

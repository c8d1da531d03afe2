// expert_mlp_low_bit on CUDA for up to 8 tokens: the two launches of expert_mlp.cu, up (SwiGLU
// inside) and down (combine inside), on the products of low_bit_rows.cuh.
//
// Bytes. The codes of each used expert are read exactly once. Not measured; at 4.8 TB/s (H200) one
// 8x7B layer would take
//                            int4 g128            int8
//     1 token    2.0 experts   0.18 GB    38 us    0.35 GB    73 us
//     8 tokens   7.2           0.65 GB   136 us    1.27 GB   264 us
//
// inner is rounded to x's dtype, as in expert_mlp: down takes it as tensor cores' operand.
#include "cuda/dynamic_shared.cuh"
#include "cuda/expert_choice.cuh"
#include "cuda/expert_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/low_bit_dispatch.cuh"
#include "cuda/low_bit_rows.cuh"
#include "cuda/row_sums.cuh"
#include "launchers.h"

// codegen: low_bit_up_kernel is due mma
// codegen: low_bit_up_kernel is due cp_async
// codegen: low_bit_up_kernel is due load_16
// codegen: low_bit_down_kernel is due mma
// codegen: low_bit_down_kernel is due cp_async
// codegen: low_bit_down_kernel is due load_16
// codegen: low_bit_up_kernel takes 41024 bytes of shared memory at launch
// codegen: low_bit_down_kernel takes 41024 bytes of shared memory at launch
// codegen: low_bit_up_kernel moves 121e6 bytes, does 470e6 operations for 8x7B int4, 1 token
// codegen: low_bit_up_kernel moves 436e6 bytes, does 3.76e9 operations for 8x7B int4, 8 tokens
// codegen: low_bit_up_kernel moves 235e6 bytes, does 470e6 operations for 8x7B int8, 1 token
// codegen: low_bit_down_kernel moves 60.6e6 bytes, does 235e6 operations for 8x7B int4, 1 token
// codegen: low_bit_down_kernel moves 218e6 bytes, does 1.88e9 operations for 8x7B int4, 8 tokens
// codegen: low_bit_down_kernel moves 117e6 bytes, does 235e6 operations for 8x7B int8, 1 token

namespace mistral_kernels::cuda {
namespace {

constexpr int kMaxPairs = 64;  // MAX_PAIRS of ops/expert_mlp.py
static_assert(kThreads >= kTileTokens * kColumns, "a thread adds up one output");
static_assert(kThreads >= kMaxPairs, "a thread reads one id");

// What a block has in dynamic shared memory.
struct Shared {
  uint4* ring;     // kWarps * kRingVectors
  float* partial;  // (pairs, kWarps, kRows)
  int* ids;        // (pairs,)

  __device__ explicit Shared(int pairs)
      : ring(dynamic_shared<uint4>()),
        partial(reinterpret_cast<float*>(ring + kWarps * kRingVectors)),
        ids(reinterpret_cast<int*>(partial + pairs * kWarps * kRows)) {}

  static size_t bytes(int pairs) {
    return sizeof(uint4) * kWarps * kRingVectors + (sizeof(float) * kWarps * kRows + 4) * pairs;
  }
};

// The pair of the lane's token, or that of a lane whose token chose the expert: the products of
// tokens that did not are nobody's, but read something.
__device__ int pair_or_another(int pair) {
  const unsigned chose = __ballot_sync(kAllLanes, pair >= 0);
  const int another = __shfl_sync(kAllLanes, pair, __ffs(static_cast<int>(chose)) - 1);
  return pair < 0 ? another : pair;
}

// Grid (columns of ffn_dim, candidates). A block computes kColumns of inner for all tokens that
// chose one expert. A warp's 16 rows are gate and up of 8 columns.
template <typename T, typename Codes, int kUnits>
__global__ void __launch_bounds__(kThreads, 3)
    low_bit_up_kernel(const T* __restrict__ x,                 // (tokens, hidden)
                      LowBit w13,                              // (experts, 2 * ffn_dim, hidden)
                      const int32_t* __restrict__ expert_ids,  // (tokens, top_k)
                      T* __restrict__ inner,                   // (tokens * top_k, ffn_dim)
                      int tokens, int top_k, int experts, int hidden, int ffn_dim,
                      int64_t stride_x_token, int64_t stride_ids_token) {
  const Shared shared(tokens * top_k);
  const ExpertChoice choice(expert_ids, stride_ids_token, tokens, top_k, experts, shared.ids);
  const int expert = choice.expert_of(blockIdx.y);
  if (expert < 0) return;

  const int group = threadIdx.x % 32 / 4;
  const int warp = threadIdx.x / 32;
  const int first_column = blockIdx.x * kColumns;
  const int column = min(first_column + warp / kUpShares * 8 + group, ffn_dim - 1);
  const int64_t gate_row = int64_t{expert} * 2 * ffn_dim + column;
  const int64_t rows[2] = {gate_row, gate_row + ffn_dim};
  const int token = pair_or_another(choice.pair_of(group, expert)) / top_k;
  const int32_t* perm = w13.perm == nullptr ? nullptr : w13.perm + int64_t{expert} * hidden;
  LowBitRows<T, Codes, kUnits> product(w13, rows, x + token * stride_x_token, perm, hidden,
                                       shared.ring);
  float sums[1][4] = {};
  product.multiply(warp % kUpShares, kUpShares, sums[0]);
  const auto pair_of = [&](int token) { return choice.pair_of(token, expert); };
  put_partial(sums, pair_of, shared.partial);
  __syncthreads();
  store_swiglu(shared.partial, choice, expert, first_column, ffn_dim, inner);
}

// Grid (columns of hidden,). A block computes kColumns of out for all tokens, one expert after
// another; all warps share k. For hidden 4096 there are 256 blocks, two a multiprocessor.
template <typename T, typename Codes, int kUnits>
__global__ void __launch_bounds__(kThreads, 2)
    low_bit_down_kernel(const T* __restrict__ inner,             // of low_bit_up_kernel
                        LowBit w2,                               // (experts, hidden, ffn_dim)
                        const float* __restrict__ weights,       // (tokens, top_k)
                        const int32_t* __restrict__ expert_ids,  // (tokens, top_k)
                        T* __restrict__ out,                     // (tokens, hidden), contiguous
                        int tokens, int top_k, int experts, int hidden, int ffn_dim,
                        int64_t stride_weights_token, int64_t stride_ids_token) {
  const Shared shared(tokens * top_k);
  const ExpertChoice choice(expert_ids, stride_ids_token, tokens, top_k, experts, shared.ids);

  const int group = threadIdx.x % 32 / 4;
  const int first_column = blockIdx.x * kColumns;
  for (int candidate = 0; candidate < candidates(tokens * top_k, experts); ++candidate) {
    const int expert = choice.expert_of(candidate);
    if (expert < 0) continue;
    const int64_t first_row = int64_t{expert} * hidden;
    const int64_t rows[2] = {first_row + min(first_column + group, hidden - 1),
                             first_row + min(first_column + group + 8, hidden - 1)};
    const int64_t pair = pair_or_another(choice.pair_of(group, expert));
    const int32_t* perm = w2.perm == nullptr ? nullptr : w2.perm + int64_t{expert} * ffn_dim;
    LowBitRows<T, Codes, kUnits> product(w2, rows, inner + pair * ffn_dim, perm, ffn_dim,
                                         shared.ring);
    float sums[1][4] = {};
    product.multiply(threadIdx.x / 32, kWarps, sums[0]);
    const auto pair_of = [&](int token) { return choice.pair_of(token, expert); };
    put_partial(sums, pair_of, shared.partial);  // each expert has pairs of its own: no barrier
  }
  __syncthreads();
  store_combined(shared.partial, choice, weights, stride_weights_token, first_column, hidden, out);
}

template <typename T, typename Codes, int kUnits>
void launch_expert_mlp_low_bit(const ExpertMlpLowBit& args, void* stream) {
  const int tokens = static_cast<int>(args.tokens);
  const int top_k = static_cast<int>(args.top_k);
  const int experts = static_cast<int>(args.experts);
  const int hidden = static_cast<int>(args.hidden);
  const int ffn_dim = static_cast<int>(args.ffn_dim);
  const int pairs = tokens * top_k;
  const dim3 up_grid((ffn_dim + kColumns - 1) / kColumns, candidates(pairs, experts));
  const dim3 down_grid((hidden + kColumns - 1) / kColumns);
  T* inner = static_cast<T*>(args.inner);
  if (up_grid.x > 0 && up_grid.y > 0) {
    launch("expert_mlp_low_bit", low_bit_up_kernel<T, Codes, kUnits>, up_grid, dim3(kThreads),
           Shared::bytes(pairs), stream, static_cast<const T*>(args.x), args.w13, args.expert_ids,
           inner, tokens, top_k, experts, hidden, ffn_dim, args.stride_x_token,
           args.stride_ids_token);
  }
  launch("expert_mlp_low_bit", low_bit_down_kernel<T, Codes, kUnits>, down_grid, dim3(kThreads),
         Shared::bytes(pairs), stream, static_cast<const T*>(inner), args.w2, args.weights,
         args.expert_ids, static_cast<T*>(args.out), tokens, top_k, experts, hidden, ffn_dim,
         args.stride_weights_token, args.stride_ids_token);
}

}  // namespace

void expert_mlp_low_bit(const ExpertMlpLowBit& args, int device, void* stream) {
  if (args.tokens == 0 || args.hidden == 0) return;
  const DeviceGuard guard(device, "expert_mlp_low_bit");
  const bool one_group =
      steps_have_one_group(args.w13, args.hidden) && steps_have_one_group(args.w2, args.ffn_dim);
  const auto run = [&](auto element, auto codes, auto units) {
    launch_expert_mlp_low_bit<decltype(element), decltype(codes), decltype(units)::value>(args,
                                                                                          stream);
  };
  with_low_bit("expert_mlp_low_bit", args.dtype, args.w13.codes, one_group, run);
}

}  // namespace mistral_kernels::cuda

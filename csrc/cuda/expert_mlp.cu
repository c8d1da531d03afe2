// expert_mlp on CUDA for up to 16 tokens: two launches, up (SwiGLU inside) and down (combine
// inside), each bound by reading weights.
//
// Bytes. The weights of each used expert are read exactly once, 6 * hidden * ffn_dim bytes an
// expert: a block works for all tokens that chose its expert. Not measured; at 4.8 TB/s (H200) one
// 8x7B layer would take
//     1 token    2.0 experts   0.70 GB   147 us
//     8 tokens   7.2           2.54 GB   529 us
//    16 tokens   7.9           2.79 GB   581 us
//
// Bytes in flight. 4.8 TB/s over 132 multiprocessors are 36 KB in the microsecond that a loaded
// memory takes to answer. A lane has kStages * 2 loads of 16 bytes on their way, so a block 32 KB.
// 80 registers a thread let three blocks share a multiprocessor, 96 KB; with 9 to 16 tokens two, 64
// KB. Down has 256 blocks for hidden 4096, all at once: 8 MB, 62 KB a multiprocessor. A warp waits
// for its loads, consumes them all and asks for the next, so it needs that reserve.
//
// Arithmetic. Tensor cores serve even a single token: a turn of the loop is 97 instructions a warp
// (105 in down; 165 and 159 with 9 to 16 tokens; sm_90a) for 4 KB of weights, while a
// multiprocessor that gets 20.7 bytes a cycle of 1.755 GHz has 790 issue slots for them. In plain
// float, converting would take 64 and each token 64 more, before any load of x or inner.
//
// x and inner come through L1, which streamed weights leave alone: blocks of one expert run one
// after another and meet there the rows of their tokens. Shared memory would be filled anew by each
// block, and has no room for 16 rows of inner (458 KB).
#include <stdexcept>

#include "cuda/dynamic_shared.cuh"
#include "cuda/expert_choice.cuh"
#include "cuda/expert_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/masked_load.cuh"
#include "cuda/mma.cuh"
#include "cuda/row_sums.cuh"
#include "launchers.h"

// codegen: expert_up_kernel is due mma
// codegen: expert_up_kernel is due load_16
// codegen: expert_down_kernel is due mma
// codegen: expert_down_kernel is due load_16
// codegen: expert_up_kernel<*, 1> takes 8192 bytes of shared memory at launch
// codegen: expert_up_kernel<*, 2> takes 16384 bytes of shared memory at launch
// codegen: expert_down_kernel<*, 1> takes 8192 bytes of shared memory at launch
// codegen: expert_down_kernel<*, 2> takes 16384 bytes of shared memory at launch
// codegen: expert_up_kernel moves 470e6 bytes, does 470e6 operations for 8x7B, 1 token
// codegen: expert_up_kernel moves 1.69e9 bytes, does 3.76e9 operations for 8x7B, 8 tokens
// codegen: expert_up_kernel moves 1.86e9 bytes, does 7.52e9 operations for 8x7B, 16 tokens
// codegen: expert_down_kernel moves 235e6 bytes, does 235e6 operations for 8x7B, 1 token
// codegen: expert_down_kernel moves 846e6 bytes, does 1.88e9 operations for 8x7B, 8 tokens
// codegen: expert_down_kernel moves 930e6 bytes, does 3.76e9 operations for 8x7B, 16 tokens

namespace mistral_kernels::cuda {
namespace {

// MAX_TOKENS and MAX_PAIRS of ops/expert_mlp.py; a pair is (token, slot).
constexpr int kMaxTokens = 16;
constexpr int kMaxPairs = 64;

constexpr int kStep = 32;                // k that the four lanes of a row load at once, for two mma
constexpr int kStages = 4;               // steps that a warp has on their way
constexpr int kChunk = kStages * kStep;  // k that a warp takes at a turn
static_assert(kThreads == kMaxTokens * kColumns, "a thread adds up one output");
static_assert(kThreads >= kMaxPairs, "a thread reads one id");

// ---- Products of weight rows and tokens.

// A row along k as one lane reads it, 8 elements at a time.
template <typename T>
struct LaneRow {
  const T* next;
  int left;  // elements from `next` to the end; what lies behind counts as 0 and is not read

  __device__ void begin(const T* row, int size, int k) {
    next = row + k;
    left = size - k;
  }
};

template <typename T, int kTiles>
struct LaneRows {
  LaneRow<T> weights[2];      // rows g and g + 8 of the warp, g = lane / 4
  LaneRow<T> tokens[kTiles];  // tokens g and g + 8

  __device__ void advance(int count) {
#pragma unroll
    for (LaneRow<T>& row : weights) row = {row.next + count, row.left - count};
#pragma unroll
    for (LaneRow<T>& row : tokens) row = {row.next + count, row.left - count};
  }
};

// What a lane holds of a step.
template <int kTiles>
struct Stage {
  uint4 weights[2];
  uint4 tokens[kTiles];
};

template <typename T, int kTiles>
__device__ void load_stage(const LaneRows<T, kTiles>& rows, int offset, Stage<kTiles>& stage) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const LaneRow<T>& row = rows.weights[i];
    stage.weights[i] = load_streaming_16(row.next + offset, offset < row.left);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const LaneRow<T>& row = rows.tokens[i];
    stage.tokens[i] = load_cached_16(row.next + offset, offset < row.left);
  }
}

// An mma wants of lane t of a row the columns 2t, 2t+1, 2t+8, 2t+9 of 16. Here they are elements
// 8t .. 8t+3 of a step, and 8t+4 .. 8t+7 in a second mma: which k is which column does not matter
// as long as weights and tokens agree, and 16 bytes of memory need no shuffling.
template <typename T, int kTiles>
__device__ void multiply_stage(const Stage<kTiles>& stage, float (&sums)[kTiles][4]) {
  const auto& [upper, lower] = stage.weights;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const uint4& x = stage.tokens[i];
    mma_16x8x16<T>(sums[i], {upper.x, lower.x, upper.y, lower.y}, {x.x, x.y});
    mma_16x8x16<T>(sums[i], {upper.z, lower.z, upper.w, lower.w}, {x.z, x.w});
  }
}

// sums += weights * tokens over every `shares`-th chunk of k up to `size`, from `k` on, where
// `rows` begin.
template <typename T, int kTiles>
__device__ void multiply(LaneRows<T, kTiles>& rows, int k, int size, int shares,
                         float (&sums)[kTiles][4]) {
  Stage<kTiles> stages[kStages];
#pragma unroll
  for (int i = 0; i < kStages; ++i) load_stage(rows, i * kStep, stages[i]);
#pragma unroll 1  // two turns at once would need more registers than three blocks leave
  for (; k < size; k += shares * kChunk) {
    rows.advance(shares * kChunk);
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      multiply_stage<T>(stages[i], sums);
      load_stage(rows, i * kStep, stages[i]);
    }
  }
}

// ---- The kernels.

// Grid (columns of ffn_dim, candidates). A block computes kColumns of inner for all tokens that
// chose one expert. A warp's 16 rows are gate and up of 8 columns.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2)
    expert_up_kernel(const T* __restrict__ x,                 // (tokens, hidden)
                     const T* __restrict__ w13,               // (experts, 2 * ffn_dim, hidden)
                     const int32_t* __restrict__ expert_ids,  // (tokens, top_k)
                     T* __restrict__ inner,                   // (tokens * top_k, ffn_dim)
                     int tokens, int top_k, int experts, int hidden, int ffn_dim,
                     int64_t stride_x_token, int64_t stride_w13_expert, int64_t stride_w13_row,
                     int64_t stride_ids_token) {
  __shared__ int ids[kMaxPairs];
  float* partial = dynamic_shared<float>();
  const ExpertChoice choice(expert_ids, stride_ids_token, tokens, top_k, experts, ids);
  const int expert = choice.expert_of(blockIdx.y);
  if (expert < 0) return;

  const int group = threadIdx.x % 32 / 4;
  const int warp = threadIdx.x / 32;
  const int first_column = blockIdx.x * kColumns;
  const int column = first_column + warp / kUpShares * 8 + group;
  const int k = warp % kUpShares * kChunk;
  const int lane_k = k + threadIdx.x % 4 * 8;
  const T* gate_row = w13 + expert * stride_w13_expert + column * stride_w13_row;
  LaneRows<T, kTiles> rows;
  rows.weights[0].begin(gate_row, column < ffn_dim ? hidden : 0, lane_k);
  rows.weights[1].begin(gate_row + ffn_dim * stride_w13_row, column < ffn_dim ? hidden : 0, lane_k);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = i * kTileTokens + group;
    const bool chose = choice.pair_of(token, expert) >= 0;
    rows.tokens[i].begin(x + token * stride_x_token, chose ? hidden : 0, lane_k);
  }
  float sums[kTiles][4] = {};
  multiply(rows, k, hidden, kUpShares, sums);
  const auto pair_of = [&](int token) { return choice.pair_of(token, expert); };
  put_partial(sums, pair_of, partial);
  __syncthreads();
  store_swiglu(partial, choice, expert, first_column, ffn_dim, inner);
}

// Grid (columns of hidden,). A block computes kColumns of out for all tokens, one expert after
// another; all warps share k.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2)
    expert_down_kernel(const T* __restrict__ inner,             // of expert_up_kernel
                       const T* __restrict__ w2,                // (experts, hidden, ffn_dim)
                       const float* __restrict__ weights,       // (tokens, top_k)
                       const int32_t* __restrict__ expert_ids,  // (tokens, top_k)
                       T* __restrict__ out,                     // (tokens, hidden), contiguous
                       int tokens, int top_k, int experts, int hidden, int ffn_dim,
                       int64_t stride_w2_expert, int64_t stride_w2_row,
                       int64_t stride_weights_token, int64_t stride_ids_token) {
  __shared__ int ids[kMaxPairs];
  float* partial = dynamic_shared<float>();
  const ExpertChoice choice(expert_ids, stride_ids_token, tokens, top_k, experts, ids);

  const int group = threadIdx.x % 32 / 4;
  const int first_column = blockIdx.x * kColumns;
  const int k = threadIdx.x / 32 * kChunk;
  const int lane_k = k + threadIdx.x % 4 * 8;
  for (int candidate = 0; candidate < candidates(tokens * top_k, experts); ++candidate) {
    const int expert = choice.expert_of(candidate);
    if (expert < 0) continue;
    LaneRows<T, kTiles> rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first_column + i * 8 + group;
      rows.weights[i].begin(w2 + expert * stride_w2_expert + column * stride_w2_row,
                            column < hidden ? ffn_dim : 0, lane_k);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int pair = choice.pair_of(i * kTileTokens + group, expert);
      rows.tokens[i].begin(inner + static_cast<int64_t>(pair) * ffn_dim, pair < 0 ? 0 : ffn_dim,
                           lane_k);
    }
    float sums[kTiles][4] = {};
    multiply(rows, k, ffn_dim, kWarps, sums);
    const auto pair_of = [&](int token) { return choice.pair_of(token, expert); };
    put_partial(sums, pair_of, partial);  // each expert has pairs of its own: no barrier
  }
  __syncthreads();
  store_combined(partial, choice, weights, stride_weights_token, first_column, hidden, out);
}

template <typename T, int kTiles>
void launch_expert_mlp(const ExpertMlp& args, void* stream) {
  const int tokens = static_cast<int>(args.tokens);
  const int top_k = static_cast<int>(args.top_k);
  const int experts = static_cast<int>(args.experts);
  const int hidden = static_cast<int>(args.hidden);
  const int ffn_dim = static_cast<int>(args.ffn_dim);
  const int pairs = tokens * top_k;
  const size_t partial_bytes = sizeof(float) * pairs * kWarps * kRows;
  const unsigned up_strips = (ffn_dim + kColumns - 1) / kColumns;
  const unsigned down_strips = (hidden + kColumns - 1) / kColumns;
  const dim3 up_grid(up_strips, candidates(pairs, experts));
  T* inner = static_cast<T*>(args.inner);
  if (up_grid.x > 0 && up_grid.y > 0) {
    launch("expert_mlp", expert_up_kernel<T, kTiles>, up_grid, dim3(kThreads), partial_bytes,
           stream, static_cast<const T*>(args.x), static_cast<const T*>(args.w13), args.expert_ids,
           inner, tokens, top_k, experts, hidden, ffn_dim, args.stride_x_token,
           args.stride_w13_expert, args.stride_w13_row, args.stride_ids_token);
  }
  launch("expert_mlp", expert_down_kernel<T, kTiles>, dim3(down_strips), dim3(kThreads),
         partial_bytes, stream, static_cast<const T*>(inner), static_cast<const T*>(args.w2),
         args.weights, args.expert_ids, static_cast<T*>(args.out), tokens, top_k, experts, hidden,
         ffn_dim, args.stride_w2_expert, args.stride_w2_row, args.stride_weights_token,
         args.stride_ids_token);
}

template <typename T>
void launch_expert_mlp(const ExpertMlp& args, void* stream) {
  return args.tokens <= kTileTokens ? launch_expert_mlp<T, 1>(args, stream)
                                    : launch_expert_mlp<T, 2>(args, stream);
}

}  // namespace

void expert_mlp(const ExpertMlp& args, int device, void* stream) {
  if (args.tokens == 0) return;
  const DeviceGuard guard(device, "expert_mlp");
  switch (args.dtype) {
    case Dtype::kBFloat16:
      return launch_expert_mlp<__nv_bfloat16>(args, stream);
    case Dtype::kFloat16:
      return launch_expert_mlp<__half>(args, stream);
    default:
      throw std::invalid_argument("expert_mlp: dtype must be bfloat16 or float16");
  }
}

}  // namespace mistral_kernels::cuda

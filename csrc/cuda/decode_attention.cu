// decode_attention on CUDA: RoPE, ring write, windowed attention and reduction in one launch.
//
// A sequence moves 2 * keys * kv_heads * head_dim * itemsize bytes for 4 * keys * q_heads *
// head_dim operations: bound by memory. Mistral 7B (32/8 heads of 128, bf16) reads 16.8 MB a
// sequence at window 4096. Predicted for batch 1 / 8 / 32, none of it measured: A100 (1.6 TB/s of
// 2.0) 14 / 87 / 339 us, H100 (2.8 of 3.35) 9 / 51 / 195, H200 (4.0 of 4.8) 7 / 37 / 137: the
// bytes, and about 3 us for the chain of latencies (launch, position, table, keys, counter,
// partials). Partials at batch 1 are 33 * 32 * 130 floats, 0.5 MB,
// which stay in L2.
//
// In flight: a block keeps two stages of 64 keys and values, 64 KB of cp.async at head_dim 128 in
// bf16, and starts a half stage's next copies as soon as it has been read, so that 48 KB or more
// are under way. Two blocks share a processor (70 KB of shared memory each; 128 threads of at most
// 172 registers at head_dim 128, 245 at 256): 96 KB, where 4.8 TB/s times 1 us of latency over 132
// processors want 36 (A100: 19). sm_120, with 100 KB, holds one block: 48 KB for 10. Warps work
// alone, each on 16 of a tile's keys, so no barrier stands in the loop. A slice of 16 keys costs a
// warp 470 instructions in bf16 on sm_90a, 120 cycles of a processor's four schedulers, where its
// 8 KB take 480 cycles at 4 TB/s. In an 8-bit cache it is 680 for e4m3 and 720 for int8, which are
// widened: 170 to 180 cycles where the 4 KB take 240, so bytes limit there, too.
#include <stdexcept>
#include <type_traits>

#include "cuda/cache_codes.cuh"
#include "cuda/decode_work.cuh"
#include "cuda/dynamic_shared.cuh"
#include "cuda/key_slice.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/softmax_parts.cuh"
#include "launchers.h"

// codegen: decode_attention_kernel is due mma
// codegen: decode_attention_kernel is due cp_async
// codegen: decode_attention_kernel is due load_16
// codegen: decode_attention_kernel is due store_16
// codegen: decode_attention_kernel takes 65536 bytes of shared memory at launch
// codegen: decode_attention_kernel moves 16.8e6 bytes, does 67e6 operations for batch 1, 4096 keys
// codegen: decode_attention_kernel moves 134e6 bytes, does 537e6 operations for batch 8
// codegen: decode_attention_kernel moves 538e6 bytes, does 2.15e9 operations for batch 32

namespace mistral_kernels::cuda {
namespace {

constexpr int kMaxSplits = 64;             // MAX_SPLITS of kernels/key_splits.py
constexpr int kBytesInFlight = 64 * 1024;  // of a block; the head of this file says why
constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;

template <typename T, typename Cache, int kHeadDim>
struct KeyTile {
  using Slice = KeySlice<Cache, kHeadDim>;
  // Fewer keys where rows have 512 bytes, so that two stages of them fit as well.
  static constexpr int kWarps = Slice::kRowBytes > 256 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpThreads;
  static constexpr int kBlockN = kWarps * kSliceKeys;
  static constexpr int kStageBytes = 2 * Slice::kBytes;  // of a warp: keys, then values
  static constexpr int kFitting = kBytesInFlight / (kWarps * kStageBytes);
  static constexpr int kStages = kFitting < 4 ? kFitting : 4;
  static constexpr int kPitch = kHeadDim + 4;  // floats between heads: no bank conflicts
  static constexpr int kCopyBytes = kWarps * kStages * kStageBytes;
  static constexpr int kMergeBytes = kWarps * kHeads * kPitch * sizeof(float);
  // The warps' sums take the place of the keys once those are used up.
  static constexpr int kSharedBytes = kCopyBytes > kMergeBytes ? kCopyBytes : kMergeBytes;
  static_assert(kStages >= 2, "one stage is worked on while another is copied");
};

// Four neighbours of a head's values, as T, and once a head its lse. No weight at all: 0 and -inf.
template <typename T>
__device__ void store_outputs(const DecodeAttention& args, const Work& work, int head, int column,
                              float4 sum, float top, float total) {
  const int64_t row = work.first_row + head;
  const bool empty = total == 0.0f;
  const float share = empty ? 0.0f : 1.0f / total;
  uint2 rounded;
  rounded.x = packed<T>(sum.x * share, sum.y * share);
  rounded.y = packed<T>(sum.z * share, sum.w * share);
  *reinterpret_cast<uint2*>(static_cast<T*>(args.out) + row * args.head_dim + column) = rounded;
  if (column == 0) args.lse[row] = empty ? -INFINITY : (top + log2f(total)) * kLn2;
}

// The partials of all blocks in the workspace, behind its counters.
struct Partials {
  float* sums;    // (blocks, splits, heads, head_dim): first, so that rows are vectors
  float* tops;    // (blocks, splits, heads)
  float* totals;  // likewise
  int64_t first;  // row of this block's split 0, head 0

  __device__ explicit Partials(const DecodeAttention& args)
      : sums(reinterpret_cast<float*>(static_cast<char*>(args.cut.workspace) +
                                      args.cut.counter_bytes)),
        first(int64_t{blockIdx.x} * gridDim.y * args.cut.heads) {
    const int64_t rows = int64_t{gridDim.x} * gridDim.y * args.cut.heads;
    tops = sums + rows * args.head_dim;
    totals = tops + rows;
  }
};

// Leaves the softmax of one warp in shared memory, as part `warp`.
template <int kHeadDim, int kPitch, typename Cache, typename Parts>
__device__ void leave_sums(Softmax<kHeadDim>& softmax, Parts& parts, float* merged) {
  const int warp = threadIdx.x / kWarpThreads;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = threadIdx.x % 4 * 2 + i;
    float total = softmax.total[i];
#pragma unroll
    for (int offset = 4; offset < kWarpThreads; offset *= 2) {
      total += __shfl_xor_sync(kAllLanes, total, offset);
    }
    parts.tops[warp][head] = softmax.top[i];  // the same in all lanes that write it
    parts.totals[warp][head] = total;
    float* row = merged + (warp * kHeads + head) * kPitch;
#pragma unroll
    for (int tile = 0; tile < kHeadDim / 16; ++tile) {
      row[dimension_of<Cache>(tile, 0)] = softmax.sums[tile][i];
      row[dimension_of<Cache>(tile, 1)] = softmax.sums[tile][i + 2];
    }
  }
}

// Grid (batch * kv_heads * parts of a group, splits). A block owns one split of one kv head of one
// sequence, for at most 8 heads of its group; the last of them to finish also owns the reduction.
template <typename T, typename Cache, int kHeadDim>
__global__ void __launch_bounds__(KeyTile<T, Cache, kHeadDim>::kThreads, 2)
    decode_attention_kernel(const DecodeAttention args) {
  using Tile = KeyTile<T, Cache, kHeadDim>;
  __shared__ __align__(16) T queries[kHeads * kHeadDim];
  __shared__ __align__(16) T turned_key[kHeadDim];
  __shared__ __align__(16) Cache newest[2][kHeadDim];
  __shared__ SoftmaxParts<kMaxSplits, kHeads> parts;
  __shared__ bool is_last;
  const Work work(args, Tile::kBlockN);
  const int head_dim = static_cast<int>(args.head_dim);
  if (work.position < 0) {
    for (int i = threadIdx.x; blockIdx.y == 0 && i < work.heads * head_dim / 4;
         i += Tile::kThreads) {
      store_outputs<T>(args, work, i / (head_dim / 4), i % (head_dim / 4) * 4, float4{}, 0.0f,
                       0.0f);
    }
    return;
  }
  if (static_cast<int>(blockIdx.y) >= work.live) return;

  // Start the first copies: they are what the block waits for.
  const SliceCopies<Cache, kHeadDim> k_copies(args.ring.k, work.head, head_dim);
  const SliceCopies<Cache, kHeadDim> v_copies(args.ring.v, work.head, head_dim);
  const int warp = threadIdx.x / kWarpThreads;
  char* const stages = dynamic_shared<char>() + warp * Tile::kStages * Tile::kStageBytes;
  const bool has_new = args.k.data != nullptr;
  // The new key's row is put in from `newest`: its slot is being written.
  const int stop = has_new ? work.position : work.position + 1;
  const auto first_key = [=](int tile) { return tile * Tile::kBlockN + warp * kSliceKeys; };
  const auto seen = [=](int tile) {
    const int key = first_key(tile);
    return tile < work.end && key + kSliceKeys > work.first && key < stop;
  };
  RingCursor cursor(args, work);
  const auto copy = [&](const SliceCopies<Cache, kHeadDim>& copies, char* to, const RingCursor& at,
                        int tile) {
    if (tile < work.end) {
      const bool there = seen(tile);
      copies.start(to, there ? at.page : 0, there ? at.row : 0, first_key(tile) - work.first,
                   stop - work.first);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < Tile::kStages; ++i) {
    char* stage = stages + i * Tile::kStageBytes;
    const int tile = work.begin + i;
    cursor.advance(first_key(tile), Tile::kBlockN, seen(tile));
    copy(k_copies, stage, cursor, tile);
    copy(v_copies, stage + Tile::Slice::kBytes, cursor, tile);
  }

  // Turn q, and in the newest split the new key, which goes to the ring as it will be attended.
  const int64_t first_head = work.first_row - work.sequence * args.q_heads;
  const T* q_rows = static_cast<const T*>(args.q.data) + work.sequence * args.q.stride_token +
                    first_head * args.q.stride_head;
  const float q_scale = args.q_scale == nullptr ? 1.0f : args.q_scale[work.position];
  turn_heads<T, kHeadDim>(args, q_rows, args.q.stride_head, work.heads, work.position, q_scale,
                          queries);
  const float k_scale = scale_of(args.ring.k, work.head);
  const float v_scale = scale_of(args.ring.v, work.head);
  if (work.newest && has_new) {
    const auto new_row = [&](const HeadRows& rows) {
      return static_cast<const T*>(rows.data) + work.sequence * rows.stride_token +
             work.head * rows.stride_head;
    };
    turn_heads<T, kHeadDim>(args, new_row(args.k), 0, 1, work.position, 1.0f, turned_key);
    __syncthreads();
    round_row<Cache, kHeadDim>(turned_key, head_dim, k_scale, newest[0]);
    round_row<Cache, kHeadDim>(new_row(args.v), head_dim, v_scale, newest[1]);
    __syncthreads();
    if (work.first_head == 0) {
      RingCursor slot(args, work);
      slot.seek(work.position);
      write_row(args.ring.k, slot, work.head, head_dim, newest[0]);
      write_row(args.ring.v, slot, work.head, head_dim, newest[1]);
    }
  }
  __syncthreads();
  uint32_t q[kHeadDim / 16][2];
  load_queries<T, Cache, kHeadDim>(q, queries, work.heads, head_dim);

  // Keys and values in turn: 2 * kStages groups of copies are under way but for the one awaited.
  const float score_scale = args.scale * kLog2E * k_scale;
  // Where `starts` hides the new key, its row stays 0: no weight is 0 times a NaN.
  const bool sees_new = work.newest && has_new && work.first <= work.position;
  const int new_tile = sees_new ? work.position / Tile::kBlockN : -1;
  const int new_row = work.position - first_key(new_tile);  // of this warp's slice, if within it
  Softmax<kHeadDim> softmax;
  for (int tile = work.begin; tile < work.end; ++tile) {
    char* const keys = stages + (tile - work.begin) % Tile::kStages * Tile::kStageBytes;
    char* const values = keys + Tile::Slice::kBytes;
    const bool puts = tile == new_tile && new_row >= 0 && new_row < kSliceKeys;
    const int next = tile + Tile::kStages;
    cursor.advance(first_key(next), Tile::kBlockN, seen(next));
    wait_copies<2 * Tile::kStages - 1>();
    __syncwarp();
    if (puts) put_row<typename Tile::Slice>(keys, new_row, newest[0]);
    __syncwarp();
    float scores[4];
    score_slice<T, Cache, kHeadDim>(scores, keys, q);
    __syncwarp();  // all lanes have read what the next copies overwrite
    copy(k_copies, keys, cursor, next);

    const int key = first_key(tile) + threadIdx.x % kWarpThreads / 4;
    softmax.weigh(scores, score_scale, key, work.first, work.position);
    wait_copies<2 * Tile::kStages - 1>();
    __syncwarp();
    if (puts) put_row<typename Tile::Slice>(values, new_row, newest[1]);
    __syncwarp();
    add_slice<T, Cache, kHeadDim>(softmax.sums, values, scores);
    __syncwarp();
    copy(v_copies, values, cursor, next);
  }

  // Bring the warps together; the only live split has the result.
  __syncthreads();
  float* const merged = dynamic_shared<float>();
  leave_sums<kHeadDim, Tile::kPitch, Cache>(softmax, parts, merged);
  const Partials partials(args);
  const int64_t own = partials.first + int64_t{blockIdx.y} * args.cut.heads;
  merge_parts<Tile::kWarps>(
      parts, Tile::kWarps, work.heads, head_dim,
      [=](int part, int head, int column) {
        const float* row = merged + (part * kHeads + head) * Tile::kPitch;
        return *reinterpret_cast<const float4*>(row + column);
      },
      [&](int head, int column, float4 sum) {
        sum = make_float4(sum.x * v_scale, sum.y * v_scale, sum.z * v_scale, sum.w * v_scale);
        if (work.live == 1) {
          store_outputs<T>(args, work, head, column, sum, parts.top[head], parts.total[head]);
        } else {
          float* row = partials.sums + (own + head) * head_dim;
          *reinterpret_cast<float4*>(row + column) = sum;
          if (column == 0) partials.tops[own + head] = parts.top[head];
          if (column == 0) partials.totals[own + head] = parts.total[head];
        }
      });
  if (work.live == 1) return;

  // The block that counts last adds up all splits, in their order.
  fence_device();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t limit = work.live - 1;
    auto* counters = static_cast<uint32_t*>(args.cut.workspace);
    is_last = increment_wrapping(counters + blockIdx.x, limit) == limit;
  }
  __syncthreads();
  if (!is_last) return;
  fence_device();
  for (int i = threadIdx.x; i < work.live * work.heads; i += Tile::kThreads) {
    const int64_t at = partials.first + int64_t{i / work.heads} * args.cut.heads + i % work.heads;
    parts.tops[i / work.heads][i % work.heads] = load_past_l1(partials.tops + at);
    parts.totals[i / work.heads][i % work.heads] = load_past_l1(partials.totals + at);
  }
  merge_parts<Tile::kWarps>(
      parts, work.live, work.heads, head_dim,
      [=](int part, int head, int column) {
        const int64_t row = partials.first + int64_t{part} * args.cut.heads + head;
        return load_past_l1(
            reinterpret_cast<const float4*>(partials.sums + row * head_dim + column));
      },
      [&](int head, int column, float4 sum) {
        store_outputs<T>(args, work, head, column, sum, parts.top[head], parts.total[head]);
      });
}

// ---- Launch.

template <typename T, typename Cache, int kHeadDim>
void launch_decode_attention(const DecodeAttention& args, void* stream) {
  using Tile = KeyTile<T, Cache, kHeadDim>;
  const auto kernel = decode_attention_kernel<T, Cache, kHeadDim>;
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t parts = (group + args.cut.heads - 1) / args.cut.heads;
  const dim3 grid(static_cast<unsigned>(args.batch * args.kv_heads * parts),
                  static_cast<unsigned>(args.cut.splits));
  launch("decode_attention", kernel, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, args);
}

template <typename T, typename Cache>
void with_head_dim(const DecodeAttention& args, void* stream) {
  if (args.head_dim <= 64) return launch_decode_attention<T, Cache, 64>(args, stream);
  if (args.head_dim <= 128) return launch_decode_attention<T, Cache, 128>(args, stream);
  return launch_decode_attention<T, Cache, 256>(args, stream);
}

template <typename T>
void with_cache(const DecodeAttention& args, void* stream) {
  switch (args.ring.dtype) {
    case Dtype::kInt8:
      return with_head_dim<T, Int8>(args, stream);
    case Dtype::kFloat8:
      return with_head_dim<T, Float8>(args, stream);
    default:
      return with_head_dim<T, T>(args, stream);
  }
}

}  // namespace

void decode_attention(const DecodeAttention& args, int device, void* stream) {
  if (args.batch == 0) return;
  const DeviceGuard guard(device, "decode_attention");
  switch (args.dtype) {
    case Dtype::kBFloat16:
      return with_cache<__nv_bfloat16>(args, stream);
    case Dtype::kFloat16:
      return with_cache<__half>(args, stream);
    default:
      throw std::invalid_argument("decode_attention: dtype must be bfloat16 or float16");
  }
}

}  // namespace mistral_kernels::cuda

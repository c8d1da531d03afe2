// rope and rope_ on CUDA: one pass, out of place or in place.
//
// A token moves 2 * (q_heads + kv_heads) * head_dim * itemsize bytes and reads head_dim * 4 of
// tables, which its blocks find in L2 and, but for the first head, in L1; 3.5 operations an
// element: memory bounds it at every size. 4096 tokens of 32 + 8 heads of 128 in bf16 are 86 MB:
// predicted at the data sheets' bandwidth are 42 us on A100 (2.0 TB/s), 26 on H100 (3.35) and 18 on
// H200 (4.8); its time is not measured. A thread has two vectors in flight, and 56 registers leave
// room for 1152 of them on an SM: 36 KB, where H200's latency wants some 30 KB.
#include "cuda/convert.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "launchers.h"

namespace mistral_kernels::cuda {
namespace {

// Not measured. A token of 32 + 8 heads of 128 in bf16 is 3 blocks of 16 heads.
constexpr int kThreads = 128;

// A pair turned by its angle, times scale, rounded once.
template <typename T>
__device__ void turn(T& first, T& second, float cos, float sin, float scale) {
  const float a = to_float(first);
  const float b = to_float(second);
  first = from_float<T>((a * cos - b * sin) * scale);
  second = from_float<T>((b * cos + a * sin) * scale);
}

// Grid (tokens, pieces of a token's heads). A thread owns two vectors of one head: the pairs that
// are whole in them, in either layout. Of a head of 32 with vectors of 8, two threads share:
//   thread 0: elements 0..7 and 16..23: pairs 0..7 half-split, pairs 0..3 and 8..11 interleaved
//   thread 1: elements 8..15 and 24..31: pairs 8..15 half-split, 4..7 and 12..15 interleaved
// codegen: rope_kernel<*, true> is due load_16
// codegen: rope_kernel<*, true> is due store_16
// codegen: rope_kernel moves 86e6 bytes, does 63e6 operations for 4096 tokens of 40 heads of 128
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads) rope_kernel(const Rope args) {
  constexpr int kWidth = Vector<T>::kWidth;
  constexpr int kGroup = kWidth / 2;  // pairs of a vector when interleaved
  const int64_t token = blockIdx.x;
  const int half = static_cast<int>(args.head_dim / 2);
  const int threads_a_head = (half + kWidth - 1) / kWidth;
  const int thread = blockIdx.y * kThreads + threadIdx.x;
  const int row = thread / threads_a_head;  // heads of q, then those of k
  const bool is_q = row < args.q.heads;
  if (row >= args.q.heads + args.k.heads) return;
  const RopeHeads x = is_q ? args.q : args.k;
  const int64_t head = is_q ? row : row - args.q.heads;

  // Both vectors, before the position is known: neither waits for the other.
  const int column = thread % threads_a_head * kWidth;
  const int apart = args.interleaved ? threads_a_head * kWidth : half;
  const int end = args.interleaved ? 2 * half : half;
  const int left = end - column;
  const int left_second = args.interleaved ? left - apart : left;
  const T* from =
      static_cast<const T*>(x.from) + token * x.stride_from_token + head * x.stride_from_head;
  Vector<T> first = load_vector<kWhole>(from + column, left);
  Vector<T> second = load_vector<kWhole>(from + apart + column, left_second);

  const int64_t position = args.positions[token];
  if (position >= 0) {
    const int pair = args.interleaved ? column / 2 : column;
    const int pair_second = args.interleaved ? pair + apart / 2 : pair + kGroup;
    const float* cos = args.cos + position * args.stride_cos;
    const float* sin = args.sin + position * args.stride_sin;
    const auto cos_first = load_vector<kWhole, float, kGroup>(cos + pair, half - pair);
    const auto sin_first = load_vector<kWhole, float, kGroup>(sin + pair, half - pair);
    const auto cos_second =
        load_vector<kWhole, float, kGroup>(cos + pair_second, half - pair_second);
    const auto sin_second =
        load_vector<kWhole, float, kGroup>(sin + pair_second, half - pair_second);
    const float scale = is_q && args.q_scale != nullptr ? args.q_scale[position] : 1.0f;
    T(&a)[kWidth] = first.values;
    T(&b)[kWidth] = second.values;
    if (args.interleaved) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        turn(a[2 * i], a[2 * i + 1], cos_first.values[i], sin_first.values[i], scale);
        turn(b[2 * i], b[2 * i + 1], cos_second.values[i], sin_second.values[i], scale);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        turn(a[i], b[i], cos_first.values[i], sin_first.values[i], scale);
        turn(a[kGroup + i], b[kGroup + i], cos_second.values[i], sin_second.values[i], scale);
      }
    }
  }

  // No other thread reads what this one writes, so in place needs no care.
  T* to = static_cast<T*>(x.to) + token * x.stride_to_token + head * x.stride_to_head;
  store_vector<kWhole>(to + column, first, left);
  store_vector<kWhole>(to + apart + column, second, left_second);
}

template <typename T>
void launch_rope(const Rope& args, void* stream) {
  constexpr int kWidth = Vector<T>::kWidth;
  const int64_t half = args.head_dim / 2;
  const auto heads_are_vectors = [&](const RopeHeads& x) {
    return rows_are_vectors<T>(x.from, half, x.stride_from_token, x.stride_from_head) &&
           rows_are_vectors<T>(x.to, half, x.stride_to_token, x.stride_to_head);
  };
  const bool whole = heads_are_vectors(args.q) && heads_are_vectors(args.k) &&
                     rows_are_vectors<float, kWidth / 2>(args.cos, half, args.stride_cos) &&
                     rows_are_vectors<float, kWidth / 2>(args.sin, half, args.stride_sin);
  const int64_t threads = (args.q.heads + args.k.heads) * ((half + kWidth - 1) / kWidth);
  const dim3 grid(static_cast<unsigned>(args.tokens),
                  static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  launch("rope", whole ? rope_kernel<T, true> : rope_kernel<T, false>, grid, dim3(kThreads), 0,
         stream, args);
}

}  // namespace

void rope(const Rope& args, int device, void* stream) {
  if (args.tokens * (args.q.heads + args.k.heads) * args.head_dim == 0) return;
  const DeviceGuard guard(device, "rope");
  with_dtype("rope", args.dtype,
             [&](auto element) { launch_rope<decltype(element)>(args, stream); });
}

}  // namespace mistral_kernels::cuda

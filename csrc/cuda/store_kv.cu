// store_kv_ on CUDA: new keys and values go to their slots of the ring, rounded if it is narrow.
//
// A token moves 2 * kv_heads * head_dim * (itemsize + the cache's itemsize) bytes. 4096 tokens of
// 8 heads of 128 in bf16 are 34 MB: predicted at the data sheets' bandwidth are 17 us on A100
// (2.0 TB/s), 10 on H100 (3.35) and 7 on H200 (4.8). Into an int8 or fp8 cache it is three quarters
// of the bytes, but some 30 instructions an element (a division, a rounding), which on H200 take
// about as long as those bytes. Times are not measured. A thread has a vector of k and one of v in
// flight, and at most 43 registers leave room for 1280 of them on an SM: 40 KB, where H200's
// latency wants some 30 KB.
#include <algorithm>
#include <type_traits>

#include "cuda/convert.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "launchers.h"
#include "quantised.h"

namespace mistral_kernels::cuda {
namespace {

// Not measured. A token of 8 heads of 128 in bf16 is one block.
constexpr int kThreads = 128;

struct Slot {
  int64_t page;  // negative: the row is not stored
  int64_t row;
};

// The sequence of a packed row: as many end at or before the row as there are in front of its own.
// A warp looks at 32 ends at a time, so up to 32 sequences cost one load; all lanes must call.
__device__ int find_sequence(const StoreKv& args, int64_t token) {
  int before = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarpThreads; i < args.batch; i += kWarpThreads) {
    before += args.cu_seqlens[i + 1] <= token;
  }
  return warp_sum(before);
}

// Where a packed row goes. Not stored are padding behind the last sequence, rows that later ones of
// the same call overwrite, rows in front of position 0, and slots that have no page.
__device__ Slot find_slot(const StoreKv& args, int sequence, int64_t token, uint32_t capacity) {
  const Slot nowhere = {-1, 0};
  if (sequence >= args.batch) return nowhere;
  const int64_t position = args.context_lens[sequence] + token - args.cu_seqlens[sequence];
  if (position < 0 || token < args.cu_seqlens[sequence + 1] - int64_t{capacity}) return nowhere;
  // Positions fit into 31 bits, and 64-bit divisions take several times as long.
  const uint32_t page_size = static_cast<uint32_t>(args.ring.page_size);
  const uint32_t slot = static_cast<uint32_t>(position) % capacity;
  const int32_t* table = args.ring.block_table + sequence * args.ring.stride_table;
  return {table[slot / page_size], slot % page_size};
}

// Writes a vector of k or v to its row of the cache: its very bits, or as value / scale.
template <bool kQuantised, bool kWhole, typename T>
__device__ void store_row(const Pages& pages, bool is_int8, const Slot& slot, int64_t head,
                          int64_t column, const Vector<T>& vector, int64_t left) {
  using Cache = std::conditional_t<kQuantised, uint8_t, T>;
  Cache* to = static_cast<Cache*>(pages.data) + slot.page * pages.stride_page +
              slot.row * pages.stride_row + head * pages.stride_head + column;
  if constexpr (kQuantised) {
    const float scale = pages.scale[head * pages.stride_scale];
    Vector<uint8_t, Vector<T>::kWidth> stored;
#pragma unroll
    for (int i = 0; i < Vector<T>::kWidth; ++i) {
      const float value = to_float(vector.values[i]) / scale;
      stored.values[i] = is_int8 ? static_cast<uint8_t>(int8_of(value)) : float8_of(value);
    }
    store_vector<kWhole>(to, stored, left);
  } else {
    store_vector<kWhole>(to, vector, left);
  }
}

// Grid (tokens, pieces of a token's heads). A thread owns one vector of a head of k, and v's beside
// it. Of a cache that is not quantised T has the size of the elements; only their bits move.
// codegen: store_kv_kernel<*, true> is due load_16
// codegen: store_kv_kernel<*, false, true> is due store_16
// codegen: store_kv_kernel moves 33.6e6 bytes for 4096 tokens of 8 heads of 128, bf16
// codegen: store_kv_kernel moves 25.2e6 bytes for 4096 tokens of 8 heads of 128 to int8 or fp8
template <typename T, bool kQuantised, bool kWhole>
__global__ void __launch_bounds__(kThreads) store_kv_kernel(const StoreKv args, uint32_t capacity) {
  constexpr int kWidth = Vector<T>::kWidth;
  const int64_t token = blockIdx.x;
  const int head_dim = static_cast<int>(args.head_dim);
  const int threads_a_head = (head_dim + kWidth - 1) / kWidth;
  const int thread = blockIdx.y * kThreads + threadIdx.x;
  const int64_t head = thread / threads_a_head;
  const int column = thread % threads_a_head * kWidth;
  const int left = head_dim - column;

  // Loads first: they take their time while the slot is found.
  Vector<T> k{};
  Vector<T> v{};
  if (head < args.kv_heads) {
    const auto row = [&](const HeadRows& x) {
      return static_cast<const T*>(x.data) + token * x.stride_token + head * x.stride_head + column;
    };
    k = load_vector<kWhole>(row(args.k), left);
    v = load_vector<kWhole>(row(args.v), left);
  }
  const Slot slot = find_slot(args, find_sequence(args, token), token, capacity);
  if (head >= args.kv_heads || slot.page < 0) return;
  const bool is_int8 = args.ring.dtype == Dtype::kInt8;
  store_row<kQuantised, kWhole>(args.ring.k, is_int8, slot, head, column, k, left);
  store_row<kQuantised, kWhole>(args.ring.v, is_int8, slot, head, column, v, left);
}

template <typename T, bool kQuantised>
void launch_store_kv(const StoreKv& args, void* stream) {
  constexpr int kWidth = Vector<T>::kWidth;
  using Cache = std::conditional_t<kQuantised, uint8_t, T>;
  const int64_t head_dim = args.head_dim;
  const auto rows = [&](const HeadRows& x) {
    return rows_are_vectors<T>(x.data, head_dim, x.stride_token, x.stride_head);
  };
  const auto pages = [&](const Pages& x) {
    return rows_are_vectors<Cache, kWidth>(x.data, head_dim, x.stride_page, x.stride_row,
                                           x.stride_head);
  };
  const bool whole = rows(args.k) && rows(args.v) && pages(args.ring.k) && pages(args.ring.v);
  const int64_t threads = args.kv_heads * ((head_dim + kWidth - 1) / kWidth);
  const dim3 grid(static_cast<unsigned>(args.tokens),
                  static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  // No position reaches 2^31, so a ring of more slots is one of so many.
  const int64_t capacity =
      std::min(args.ring.pages_per_seq * args.ring.page_size, int64_t{1} << 31);
  launch("store_kv_",
         whole ? store_kv_kernel<T, kQuantised, true> : store_kv_kernel<T, kQuantised, false>, grid,
         dim3(kThreads), 0, stream, args, static_cast<uint32_t>(capacity));
}

}  // namespace

void store_kv(const StoreKv& args, int device, void* stream) {
  if (args.tokens * args.batch * args.kv_heads * args.head_dim == 0) return;
  const DeviceGuard guard(device, "store_kv_");
  with_dtype("store_kv_", args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.ring.dtype == Dtype::kInt8 || args.ring.dtype == Dtype::kFloat8) {
      launch_store_kv<T, true>(args, stream);
    } else {
      launch_store_kv<std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>, false>(args, stream);
    }
  });
}

}  // namespace mistral_kernels::cuda

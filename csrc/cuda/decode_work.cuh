// What a block of decode_attention works on, and the new token's way into the ring.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/cache_codes.cuh"
#include "cuda/key_slice.cuh"
#include "launchers.h"

namespace mistral_kernels::cuda {

// What a block works on, and which keys of its sequence.
struct Work {
  int64_t sequence;
  int64_t head;       // of the cache
  int first_head;     // of q, within the group
  int64_t first_row;  // of out and lse
  int heads;          // of q, at most kHeads
  int position;       // of the new token; negative: idle
  int first;          // visible keys are first .. position; none if that is empty
  int live;           // splits that have keys
  int begin, end;     // tiles of this split
  bool newest;        // whether it has the new token's key

  __device__ Work(const DecodeAttention& args, int block_n) {
    const KeySplits& cut = args.cut;
    // 32 bits throughout: divisions of 64 take several times as long, and all blocks wait for them.
    const auto kv_heads = static_cast<uint32_t>(args.kv_heads);
    const auto group = static_cast<uint32_t>(args.q_heads) / kv_heads;
    const uint32_t parts = (group + cut.heads - 1) / cut.heads;
    const uint32_t pair = blockIdx.x / parts;
    sequence = pair / kv_heads;
    head = pair % kv_heads;
    first_head = static_cast<int>(blockIdx.x % parts) * cut.heads;
    heads = min(static_cast<int>(group) - first_head, cut.heads);
    first_row = pair * int64_t{group} + first_head;
    position = args.positions[sequence];
    const int64_t start = args.starts == nullptr ? 0 : args.starts[sequence];
    const int64_t oldest = position - args.window + 1;
    first = static_cast<int>(max(max(oldest, start), int64_t{0}));
    // The new key's tile is worked even where `starts` hides it: it is written all the same.
    const int first_tile = min(first, position) / block_n;
    const int tiles = position / block_n + 1 - first_tile;
    const int per_split = max(cut.tiles_at_least, (tiles + cut.most_splits - 1) / cut.most_splits);
    live = (tiles + per_split - 1) / per_split;
    begin = first_tile + static_cast<int>(blockIdx.y) * per_split;
    end = min(begin + per_split, first_tile + tiles);
    newest = static_cast<int>(blockIdx.y) == live - 1;
  }
};

// Where slices of 16 keys lie, one after another. They begin at multiples of 16, as pages do, so
// none lies in two pages; a ring is whole pages, so it wraps where a page ends.
struct RingCursor {
  const int32_t* table;
  uint32_t capacity;
  uint32_t page_size;
  uint32_t row = 0;
  int page = -1;  // none yet

  __device__ RingCursor(const DecodeAttention& args, const Work& work)
      : table(args.ring.block_table + work.sequence * args.ring.stride_table),
        capacity(static_cast<uint32_t>(args.ring.pages_per_seq * args.ring.page_size)),
        page_size(static_cast<uint32_t>(args.ring.page_size)) {}

  __device__ void seek(uint32_t position) {
    row = position % page_size;
    page = capacity == page_size ? table[0] : table[position % capacity / page_size];
  }

  // Goes `step` on to the slice at `key`. Divisions and table wait until a page is used up. A slice
  // that is not seen has no place: its entry of the table may be -1.
  __device__ void advance(uint32_t key, uint32_t step, bool seen) {
    row += step;
    if (seen && (page < 0 || row >= page_size)) seek(key);
  }
};

// The copies of slices of one of the two caches.
template <typename Cache, int kHeadDim>
struct SliceCopies {
  const char* head;
  int64_t page_bytes;
  int64_t row_bytes;
  int width_bytes;  // of a row

  __device__ SliceCopies(const Pages& pages, int64_t kv_head, int64_t head_dim)
      : head(static_cast<const char*>(pages.data) + kv_head * pages.stride_head * sizeof(Cache)),
        page_bytes(pages.stride_page * sizeof(Cache)),
        row_bytes(pages.stride_row * sizeof(Cache)),
        width_bytes(static_cast<int>(head_dim * sizeof(Cache))) {}

  // `count` keys from the one on that lies `ahead` of the slice's first.
  __device__ void start(char* to, int64_t page, int64_t row, int ahead, int count) const {
    copy_slice<KeySlice<Cache, kHeadDim>>(to, head + page * page_bytes + row * row_bytes, row_bytes,
                                          width_bytes, ahead, count);
  }
};

// Writes heads of `from`, turned by the angles of `position` unless there are none, times `factor`
// and rounded, to rows of kHeadDim in shared memory.
template <typename T, int kHeadDim>
__device__ void turn_heads(const DecodeAttention& args, const T* from, int64_t stride_head,
                           int heads, int64_t position, float factor, T* to) {
  const int half = static_cast<int>(args.head_dim) / 2;
  const float* cos = args.cos + position * args.stride_cos;
  const float* sin = args.sin + position * args.stride_sin;
  for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
    const int head = i / half;
    const int pair = i % half;
    const int a = args.interleaved ? 2 * pair : pair;
    const int b = args.interleaved ? a + 1 : pair + half;
    const T* row = from + head * stride_head;
    T* turned = to + head * kHeadDim;
    if (args.cos == nullptr) {
      turned[a] = row[a];
      turned[b] = row[b];
    } else {
      const float x = to_float(row[a]);
      const float y = to_float(row[b]);
      turned[a] = from_float<T>((x * cos[pair] - y * sin[pair]) * factor);
      turned[b] = from_float<T>((y * cos[pair] + x * sin[pair]) * factor);
    }
  }
}

// Of a cache without scales 1.
__device__ inline float scale_of(const Pages& pages, int64_t head) {
  return pages.scale == nullptr ? 1.0f : pages.scale[head * pages.stride_scale];
}

// Rounds a row as the cache stores it, 0 behind head_dim.
template <typename Cache, int kHeadDim, typename T>
__device__ void round_row(const T* from, int64_t head_dim, float scale, Cache* to) {
  for (int i = threadIdx.x; i < kHeadDim; i += blockDim.x) {
    to[i] = i < head_dim ? as_stored<Cache>(from[i], scale) : Cache{};
  }
}

// A slot without a page keeps nothing.
template <typename Cache>
__device__ void write_row(const Pages& pages, const RingCursor& slot, int64_t head,
                          int64_t head_dim, const Cache* from) {
  if (slot.page < 0) return;
  Cache* to = static_cast<Cache*>(pages.data) + slot.page * pages.stride_page +
              slot.row * pages.stride_row + head * pages.stride_head;
  const int chunks = static_cast<int>(head_dim * sizeof(Cache)) / kChunkBytes;
  for (int i = threadIdx.x; i < chunks; i += blockDim.x) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

}  // namespace mistral_kernels::cuda

// Which query rows and keys a tile of prefill_attention has.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int kTileRows = 192;
constexpr int kTileVectors = kTileRows / kLanes;
constexpr int kSplit = 1024;  // keys of one softmax; splits start at its multiples

// Where the keys of a sequence are: low..total-1 may be seen, and end in the ring at ring_end.
struct Range {
  int64_t begin;  // packed row of the first new token
  int64_t low;
  int64_t context;  // position of the first new token
  int64_t total;
  int64_t ring_end;
};

inline Range range_of(const PrefillAttention& args, int64_t sequence) {
  Range range = {};
  range.begin = args.cu_seqlens[sequence];
  range.context = args.context_lens == nullptr ? 0 : args.context_lens[sequence];
  range.total = range.context + args.cu_seqlens[sequence + 1] - range.begin;
  if (args.window > 0) range.low = std::max<int64_t>(0, range.context - args.window + 1);
  if (args.starts != nullptr) range.low = std::max<int64_t>(range.low, args.starts[sequence]);
  if (args.ring.block_table != nullptr) {
    range.ring_end = args.k.data == nullptr ? range.total : range.context;
    // What a ring narrower than the window no longer holds is not attended.
    const int64_t capacity = args.ring.pages_per_seq * args.ring.page_size;
    range.low = std::max(range.low, range.ring_end - capacity);
  }
  range.low = std::min(range.low, range.total);
  return range;
}

// Up to kTileRows pairs (new token, head of the group) of one sequence and kv head, tokens first.
struct Tile {
  int64_t sequence;
  int64_t kv_head;
  uint32_t group;
  uint32_t first_member;  // of the group
  int64_t first_token;    // of the sequence's new ones
  int64_t rows;           // 0: there is nothing to do
  int64_t first_key;      // what the first row sees first
  int64_t end_key;        // what the last row sees last, plus 1
  Range range;

  int64_t vectors() const { return (rows + kLanes - 1) / kLanes; }
  int64_t first_split() const { return first_key / kSplit; }
  int64_t splits() const {  // at least one, which may be empty
    return first_key < end_key ? (end_key - 1) / kSplit - first_split() + 1 : 1;
  }
  // Of all packed tokens, and of all query heads.
  int64_t token(uint32_t row) const { return range.begin + own_token(row); }
  int64_t head(uint32_t row) const { return kv_head * group + (first_member + row) % group; }

  // The keys that a row sees, first_seen..end_seen-1. Neither falls from one row to the next.
  int64_t first_seen(const PrefillAttention& args, uint32_t row) const {
    if (args.window == 0) return range.low;
    return std::max(range.low, position(row) - args.window + 1);
  }
  int64_t end_seen(const PrefillAttention& args, uint32_t row) const {
    return args.causal ? position(row) + 1 : range.total;
  }

 private:
  // 32-bit divisions: they are many, and 64-bit ones are slow.
  int64_t own_token(uint32_t row) const { return first_token + (first_member + row) / group; }
  int64_t position(uint32_t row) const { return range.context + own_token(row); }
};

// Sequence b owns tiles first_tile(b)..first_tile(b + 1)-1, enough for its rows without looking at
// any other sequence; the last of them may be empty. With 90 rows a tile, lengths 100, 10 and 80
// own tiles 0-1, 2 and 3-4.
inline int64_t first_tile(const PrefillAttention& args, int64_t sequence) {
  const int64_t group = args.q_heads / args.kv_heads;
  return args.cu_seqlens[sequence] * group / kTileRows + sequence;
}

inline Tile tile_at(const PrefillAttention& args, int64_t index, int64_t kv_head) {
  int64_t sequence = 0, end = args.batch;
  while (sequence + 1 < end) {
    const int64_t middle = (sequence + end) / 2;
    (first_tile(args, middle) <= index ? sequence : end) = middle;
  }
  Tile tile = {};
  tile.sequence = sequence;
  tile.kv_head = kv_head;
  tile.group = static_cast<uint32_t>(args.q_heads / args.kv_heads);
  tile.range = range_of(args, sequence);
  const int64_t first_row = (index - first_tile(args, sequence)) * kTileRows;
  tile.first_token = first_row / tile.group;
  tile.first_member = static_cast<uint32_t>(first_row % tile.group);
  const int64_t rows = (tile.range.total - tile.range.context) * tile.group;
  tile.rows = std::clamp<int64_t>(rows - first_row, 0, kTileRows);
  if (tile.rows > 0) {
    tile.first_key = tile.first_seen(args, 0);
    tile.end_key = tile.end_seen(args, tile.rows - 1);
  }
  return tile;
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

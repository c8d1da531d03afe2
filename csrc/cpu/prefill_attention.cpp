// prefill_attention on the CPU.
//
// A (query, key) pair that is seen costs 4 * head_dim operations: at 8192 tokens, window 512 and 16
// heads of 64 that is 16.6 GFLOP, while q, k, v and out are 84 MB. So it is bound by
// multiplication, and few queries over a long cache by reading it once.
//
// The keys of a tile are walked in blocks that start at multiples of kBlock, and in splits that
// start at multiples of kSplit. Each split has a softmax of its own, and they are merged in order:
// the bits depend neither on who works which split nor on where in a ring the keys lie.
#include <cmath>

#include "cpu/attention_panel.h"
#include "cpu/dispatch.h"
#include "cpu/prefill_state.h"
#include "cpu/prefill_tile.h"
#include "cpu/ring.h"
#include "cpu/transpose.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

constexpr int kTilesAThread = 4;  // with fewer, splits are shared out instead of tiles

// Fills q, first and seen of a tile.
template <typename T>
void load_queries_of(const PrefillAttention& args, const Tile& tile, int64_t stride,
                     const Workspace& work) {
  const T* q = static_cast<const T*>(args.q.data);
  const float scale = args.scale * kLog2E;
  for_panels(tile, [&](int64_t first, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t begin = (first + i) * kLanes;
      const T* rows[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        // Rows behind the last one repeat it; nobody reads what they become.
        const int64_t row = std::min(begin + lane, tile.rows - 1);
        rows[lane] =
            q + tile.token(row) * args.q.stride_token + tile.head(row) * args.q.stride_head;
        const int64_t seen = tile.first_seen(args, row);
        work.first[first + i][lane] = static_cast<int32_t>(seen - tile.first_key);
        work.seen[first + i][lane] = std::max<int64_t>(0, tile.end_seen(args, row) - seen);
      }
      for_vectors(args.head_dim, [&](int64_t d, int64_t count) {
        Floats square[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
          square[lane] = load(rows[lane] + d, count) * scale;
        transpose(square);
        Floats* to = work.q + first * stride + d * width + i;
        for (int64_t j = 0; j < count; ++j) to[j * width] = square[j];
      });
    }
  });
}

void load_queries(const PrefillAttention& args, const Tile& tile, int64_t stride,
                  const Workspace& work) {
  with_dtype(args.dtype,
             [&](auto element) { load_queries_of<decltype(element)>(args, tile, stride, work); });
}

// Copies rows as floats times `scale`, and raises `top` to the bits of their largest magnitudes.
template <typename T>
void widen(const T* from, int64_t stride, int64_t rows, int64_t head_dim, float scale, float* to,
           int64_t to_stride, Words& top) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += to_stride) {
    for_vectors(head_dim, [&](int64_t d, int64_t count) {
      const Floats value = load(from + d, count) * scale;
      const Words magnitude = words_of(value) & 0x7fffffffu;
      top = magnitude > top ? magnitude : top;
      store(to + d, value, count);
    });
  }
}

// Copies keys or values of positions first..end-1, from the ring and from the new tokens; false if
// an element is NaN or infinite.
bool load_keys(const PrefillAttention& args, const Tile& tile, const Pages& pages,
               const HeadRows& fresh, int64_t first, int64_t end, float* to, int64_t stride) {
  const Range& range = tile.range;
  Words top = {};
  if (first < range.ring_end) {
    const float scale = scale_of(pages, tile.kv_head);
    with_cache_dtype(args.ring.dtype, [&](auto element) {
      for_runs<decltype(element)>(args.ring, pages, tile.sequence, tile.kv_head, first,
                                  std::min(end, range.ring_end),
                                  [&](const auto* rows, int64_t position, int64_t count) {
                                    widen(rows, pages.stride_row, count, args.head_dim, scale,
                                          to + (position - first) * stride, stride, top);
                                  });
    });
  }
  const int64_t begin = std::max(first, range.ring_end);
  if (begin < end) {
    with_dtype(args.dtype, [&](auto element) {
      const auto* rows = static_cast<const decltype(element)*>(fresh.data) +
                         (range.begin + begin - range.context) * fresh.stride_token +
                         tile.kv_head * fresh.stride_head;
      widen(rows, fresh.stride_token, end - begin, args.head_dim, 1.0f,
            to + (begin - first) * stride, stride, top);
    });
  }
  bool finite = true;
  for (int lane = 0; lane < kLanes; ++lane) finite &= top[lane] < 0x7f800000u;
  return finite;
}

void attend_panel(const Keys& keys, const Panel& panel, int64_t width, bool masked,
                  Floats* scores) {
  switch (width) {
    case 1:
      return attend<1>(keys, panel, masked, scores);
    case 2:
      return attend<2>(keys, panel, masked, scores);
    default:
      return attend<kPanelWidth>(keys, panel, masked, scores);
  }
}

// The softmax of a tile over the keys of one of its splits.
void attend_split(const PrefillAttention& args, const Tile& tile, int64_t split, int64_t stride,
                  const Workspace& work, const State& state) {
  const int64_t split_key = (tile.first_split() + split) * kSplit;
  const int64_t first = std::max(split_key, tile.first_key);
  const int64_t end = std::min(split_key + kSplit, tile.end_key);
  for (int64_t i = 0; i < tile.vectors(); ++i) {
    state.largest[i] = broadcast(-INFINITY);
    state.total[i] = Floats{};
  }
  std::fill_n(state.values, tile.vectors() * stride, Floats{});
  for (int64_t block = first; block < end;) {
    const int64_t next = std::min(end, (block / kBlock + 1) * kBlock);
    load_keys(args, tile, args.ring.k, args.k, block, next, work.k, stride);
    const bool finite = load_keys(args, tile, args.ring.v, args.v, block, next, work.v, stride);
    for_panels(tile, [&](int64_t vector, int64_t width) {
      const int64_t top = vector * kLanes;
      const int64_t bottom = std::min(top + width * kLanes, tile.rows) - 1;
      // From the first key that the top row sees to the last that the bottom row does.
      const int64_t begin = std::max(block, tile.first_seen(args, top));
      const int64_t stop = std::min(next, tile.end_seen(args, bottom));
      if (begin >= stop) return;
      const bool masked = begin < tile.first_seen(args, bottom) || stop > tile.end_seen(args, top);
      const int64_t skipped = (begin - block) * stride;
      const Keys keys = {work.k + skipped,
                         work.v + skipped,
                         stride,
                         args.head_dim,
                         static_cast<int>(stop - begin),
                         static_cast<int>(begin - tile.first_key),
                         finite};
      const Panel panel = {work.q + vector * stride, work.first + vector,
                           work.seen + vector,       state.largest + vector,
                           state.total + vector,     state.values + vector * stride};
      attend_panel(keys, panel, width, masked, work.scores);
    });
    block = next;
  }
}

template <typename T>
void store_results_of(const PrefillAttention& args, const Tile& tile, int64_t stride,
                      const State& state) {
  for_panels(tile, [&](int64_t first, int64_t width) {
    for (int64_t i = first; i < first + width; ++i) {
      const int64_t rows = std::min<int64_t>(kLanes, tile.rows - i * kLanes);
      T* outs[kLanes];
      for (int64_t lane = 0; lane < rows; ++lane) {
        const int64_t row = i * kLanes + lane;
        const int64_t index = tile.token(row) * args.q_heads + tile.head(row);
        const float total = state.total[i][lane];
        outs[lane] = static_cast<T*>(args.out) + index * args.head_dim;
        args.lse[index] =
            total == 0 ? -INFINITY : state.largest[i][lane] / kLog2E + std::log(total);
      }
      const Floats share = state.total[i] == 0.0f ? Floats{} : 1.0f / state.total[i];
      for_vectors(args.head_dim, [&](int64_t d, int64_t count) {
        const Floats* from = state.values + first * stride + d * width + i - first;
        Floats square[kLanes] = {};
        for (int64_t j = 0; j < count; ++j) square[j] = from[j * width] * share;
        transpose(square);
        for (int64_t lane = 0; lane < rows; ++lane) store(outs[lane] + d, square[lane], count);
      });
    }
  });
}

void store_results(const PrefillAttention& args, const Tile& tile, int64_t stride,
                   const State& state) {
  with_dtype(args.dtype,
             [&](auto element) { store_results_of<decltype(element)>(args, tile, stride, state); });
}

// How a call is shared out.
struct Plan {
  int64_t tiles;   // of one kv head
  int64_t items;   // tiles of all kv heads
  int64_t splits;  // the most that a tile may have
  Sizes sizes;
  int workers;
  bool apart;  // too few tiles for the workers: they share out splits, and merge them afterwards
};

Plan plan_of(const PrefillAttention& args, int threads) {
  int64_t pairs = 0, keys = 0, rows = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const Range range = range_of(args, b);
    const int64_t tokens = range.total - range.context;
    pairs += tokens * (range.total - range.low);
    keys = std::max(keys, range.total - range.low);
    rows = std::max(rows, tokens * args.q_heads / args.kv_heads);
  }
  Plan plan = {};
  plan.tiles = args.tokens * args.q_heads == 0 ? 0 : first_tile(args, args.batch);
  plan.items = plan.tiles * args.kv_heads;
  plan.splits = keys / kSplit + 2;
  plan.sizes = {std::min<int64_t>(round_up(rows, kLanes) / kLanes, kTileVectors),
                round_up(args.head_dim, kSums)};
  plan.workers = team(threads, pairs * args.q_heads * args.head_dim / kLanes);
  plan.apart = plan.workers > 1 && plan.items < kTilesAThread * plan.workers && keys > kSplit;
  return plan;
}

}  // namespace

void prefill_attention(const PrefillAttention& args, int threads) {
  const Plan plan = plan_of(args, threads);
  const int64_t stride = plan.sizes.stride;
  const int64_t units = plan.apart ? plan.items * plan.splits : 0;
  Memory parts(units * plan.sizes.state());
  const auto part = [&, memory = parts.take(0)](int64_t item, int64_t split) {
    return State(memory + (item * plan.splits + split) * plan.sizes.state(), plan.sizes);
  };
  const auto tile_of = [&](int64_t item) {
    // The last tiles first: of one sequence without a window they have the most keys.
    return tile_at(args, plan.tiles - 1 - item % plan.tiles, item / plan.tiles);
  };
#pragma omp parallel num_threads(plan.workers)
  {
    Workspace work(plan.sizes);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t item = unit / plan.splits, split = unit % plan.splits;
      const Tile tile = tile_of(item);
      if (tile.rows == 0 || split >= tile.splits()) continue;
      load_queries(args, tile, stride, work);
      attend_split(args, tile, split, stride, work, part(item, split));
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < plan.items; ++item) {
      const Tile tile = tile_of(item);
      if (tile.rows == 0) continue;
      if (!plan.apart) load_queries(args, tile, stride, work);
      const State state = plan.apart ? part(item, 0) : work.tile;
      for (int64_t split = 0; split < tile.splits(); ++split) {
        const State later = plan.apart ? part(item, split) : split == 0 ? state : work.split;
        if (!plan.apart) attend_split(args, tile, split, stride, work, later);
        if (split > 0) merge(tile, stride, state, later);
      }
      store_results(args, tile, stride, state);
    }
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

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
#include <new>

#include "cpu/attention_panel.h"
#include "cpu/dispatch.h"
#include "cpu/prefill_tile.h"
#include "cpu/ring.h"
#include "cpu/transpose.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

constexpr int kBlock = 64;
constexpr int kTilesAThread = 4;  // with fewer, splits are shared out instead of tiles

// Memory for vectors, whose pieces are taken one after another.
class Memory {
 public:
  explicit Memory(int64_t vectors)
      : first_(static_cast<Floats*>(::operator new(vectors * sizeof(Floats), kAligned))),
        next_(first_) {}
  ~Memory() { ::operator delete(first_, kAligned); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  Floats* take(int64_t vectors) {
    next_ += vectors;
    return next_ - vectors;
  }

 private:
  static constexpr std::align_val_t kAligned{64};
  Floats* first_;
  Floats* next_;
};

// How much a tile of a call may need.
struct Sizes {
  int64_t vectors;  // of rows
  int64_t stride;   // head_dim, rounded up to what `multiply` works at once

  int64_t state() const { return vectors * (stride + 2); }
  int64_t keys() const { return ((kBlock + kSums) * stride + kLanes - 1) / kLanes; }
  int64_t scores() const { return (kBlock + kSums) * kPanelWidth; }
  int64_t workspace() const { return 2 * state() + vectors * (stride + 2) + scores() + 2 * keys(); }
};

// The softmax of a tile's rows over some of its keys. Panels lie one after another.
struct State {
  State(Floats* memory, const Sizes& sizes)
      : largest(memory), total(memory + sizes.vectors), values(memory + 2 * sizes.vectors) {}

  Floats* largest;  // (vectors,)
  Floats* total;    // (vectors,)
  Floats* values;   // of each panel (stride, width)
};

// What one thread works in.
struct Workspace {
  explicit Workspace(const Sizes& sizes)
      : memory(sizes.workspace()),
        tile(memory.take(sizes.state()), sizes),
        split(memory.take(sizes.state()), sizes),
        q(memory.take(sizes.vectors * sizes.stride)),
        first(reinterpret_cast<Ints*>(memory.take(sizes.vectors))),
        seen(reinterpret_cast<Words*>(memory.take(sizes.vectors))),
        scores(memory.take(sizes.scores())),
        k(reinterpret_cast<float*>(memory.take(sizes.keys()))),
        v(reinterpret_cast<float*>(memory.take(sizes.keys()))) {
    // Products read what lies behind the keys; denormals there would be slow.
    std::fill_n(reinterpret_cast<Floats*>(k), 2 * sizes.keys(), Floats{});
  }

  Memory memory;
  State tile;
  State split;
  Floats* q;    // of each panel (stride, width)
  Ints* first;  // the first key that a row sees, counted from the tile's first
  Words* seen;  // and how many
  Floats* scores;
  float* k;
  float* v;
};

// Calls body(first, width) for each panel of a tile.
template <typename Body>
inline void for_panels(const Tile& tile, Body&& body) {
  const int64_t vectors = tile.vectors();
  for (int64_t first = 0; first < vectors; first += kPanelWidth) {
    body(first, std::min<int64_t>(kPanelWidth, vectors - first));
  }
}

// Fills q, first and seen of a tile.
template <typename T>
void load_queries(const PrefillAttention& args, const Tile& tile, int64_t stride,
                  const Workspace& work) {
  const T* q = static_cast<const T*>(args.q);
  const float scale = args.scale * kLog2E;
  for_panels(tile, [&](int64_t first, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t begin = (first + i) * kLanes;
      const T* rows[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        // Rows behind the last one repeat it; nobody reads what they become.
        const int64_t row = std::min(begin + lane, tile.rows - 1);
        rows[lane] =
            q + tile.token(row) * args.stride_q_token + tile.head(row) * args.stride_q_head;
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
               const void* fresh, int64_t stride_token, int64_t stride_head, int64_t first,
               int64_t end, float* to, int64_t stride) {
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
      const auto* rows = static_cast<const decltype(element)*>(fresh) +
                         (range.begin + begin - range.context) * stride_token +
                         tile.kv_head * stride_head;
      widen(rows, stride_token, end - begin, args.head_dim, 1.0f, to + (begin - first) * stride,
            stride, top);
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

// The softmax of a tile over its keys first..end-1, one split.
void attend_split(const PrefillAttention& args, const Tile& tile, int64_t first, int64_t end,
                  int64_t stride, const Workspace& work, const State& state) {
  for (int64_t i = 0; i < tile.vectors(); ++i) {
    state.largest[i] = broadcast(-INFINITY);
    state.total[i] = Floats{};
  }
  std::fill_n(state.values, tile.vectors() * stride, Floats{});
  for (int64_t block = first; block < end;) {
    const int64_t next = std::min(end, (block / kBlock + 1) * kBlock);
    load_keys(args, tile, args.ring.k, args.k, args.stride_k_token, args.stride_k_head, block, next,
              work.k, stride);
    const bool finite = load_keys(args, tile, args.ring.v, args.v, args.stride_v_token,
                                  args.stride_v_head, block, next, work.v, stride);
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

// Adds the softmax over later keys to that over earlier ones.
void merge(const Tile& tile, int64_t stride, const State& state, const State& later) {
  for_panels(tile, [&](int64_t first, int64_t width) {
    for (int64_t i = first; i < first + width; ++i) {
      const Floats largest = larger(later.largest[i], state.largest[i]);
      const Floats decay = exp2_falling(state.largest[i] - base_of(largest));
      const Floats worth = exp2_falling(later.largest[i] - base_of(largest));
      state.largest[i] = largest;
      state.total[i] = state.total[i] * decay + later.total[i] * worth;
      for (int64_t d = 0; d < stride; ++d) {
        const int64_t at = first * stride + d * width + i - first;
        state.values[at] = state.values[at] * decay + later.values[at] * worth;
      }
    }
  });
}

template <typename T>
void store_results(const PrefillAttention& args, const Tile& tile, int64_t stride,
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

}  // namespace

void prefill_attention(const PrefillAttention& args, int threads) {
  const int64_t tiles = args.tokens == 0 ? 0 : first_tile(args, args.batch);
  const int64_t items = tiles * args.kv_heads;
  int64_t pairs = 0, most_keys = 0, most_rows = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const Range range = range_of(args, b);
    pairs += (range.total - range.context) * (range.total - range.low);
    most_keys = std::max(most_keys, range.total - range.low);
    most_rows = std::max(most_rows, (range.total - range.context) * args.q_heads / args.kv_heads);
  }
  const int64_t stride = (args.head_dim + kSums - 1) / kSums * kSums;
  const Sizes sizes = {std::min<int64_t>((most_rows + kLanes - 1) / kLanes, kTileVectors), stride};
  const int workers = team(threads, pairs * args.q_heads * args.head_dim / kLanes);
  const int64_t most_splits = most_keys / kSplit + 2;
  const bool apart = workers > 1 && items < kTilesAThread * workers && most_keys > kSplit;
  Memory parts(apart ? items * most_splits * sizes.state() : 0);
  Floats* const memory = parts.take(0);
  const auto part = [&](int64_t item, int64_t split) {
    return State(memory + (item * most_splits + split) * sizes.state(), sizes);
  };
  const auto tile_of = [&](int64_t item) {
    // The last tiles first: of one sequence without a window they have the most keys.
    return tile_at(args, tiles - 1 - item % tiles, item / tiles);
  };
  const auto begin = [&](const Tile& tile, const Workspace& work) {
    with_dtype(args.dtype,
               [&](auto element) { load_queries<decltype(element)>(args, tile, stride, work); });
  };
  const auto attend = [&](const Tile& tile, int64_t split, const Workspace& work,
                          const State& state) {
    const int64_t first = (tile.first_split() + split) * kSplit;
    attend_split(args, tile, std::max(first, tile.first_key),
                 std::min(first + kSplit, tile.end_key), stride, work, state);
  };
#pragma omp parallel num_threads(workers)
  {
    Workspace work(sizes);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < (apart ? items * most_splits : 0); ++unit) {
      const Tile tile = tile_of(unit / most_splits);
      const int64_t split = unit % most_splits;
      if (tile.rows == 0 || split >= tile.splits()) continue;
      begin(tile, work);
      attend(tile, split, work, part(unit / most_splits, split));
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      const Tile tile = tile_of(item);
      if (tile.rows == 0) continue;
      const State state = apart ? part(item, 0) : work.tile;
      if (!apart) {
        begin(tile, work);
        attend(tile, 0, work, state);
      }
      for (int64_t split = 1; split < tile.splits(); ++split) {
        const State later = apart ? part(item, split) : work.split;
        if (!apart) attend(tile, split, work, later);
        merge(tile, stride, state, later);
      }
      with_dtype(args.dtype, [&](auto element) {
        store_results<decltype(element)>(args, tile, stride, state);
      });
    }
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

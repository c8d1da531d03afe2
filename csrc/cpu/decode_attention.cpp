// decode_attention on the CPU: rotate, write, attend over the window, in one call.
//
// A sequence reads its visible keys and values once, 2 * window * kv_heads * head_dim * itemsize
// bytes, and does 4 * window * q_heads * head_dim operations: with 4 heads a group, 2 operations a
// byte of an fp32 cache and 4 of a bf16 one. An AVX-512 core that reads 10 GB/s and does 50 to 100
// GFLOP/s is bound by memory in fp32, and near the balance in bf16. Rows are prefetched: the
// hardware's own prefetchers lose track of so many short rows in turn.
//
// One unit of work is a split: the keys of 256 consecutive positions, aligned to multiples of 256,
// of one sequence and kv head. Splits are worked in any order and merged in the order of their
// positions, and every sum within one runs in position order: bits depend neither on threads nor on
// neighbours in the batch, nor on where in the ring a position lies.
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/dot.h"
#include "cpu/ring.h"
#include "cpu/rotate.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

constexpr int64_t kSplit = 256;                   // positions
constexpr int64_t kTile = 32;                         // keys that go round the heads while in L1
constexpr int kMostHeads = kRegisters == 32 ? 4 : 2;  // of a group, in registers
constexpr int kVectors = 4;                           // of a value row in registers
// Keys between a row in use and the one being fetched.
template <typename Cache>
constexpr int64_t kAhead = 64 / sizeof(Cache);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Heads of a group that go through a split together: code exists for these numbers.
inline int heads_at_once(int64_t group) { return group <= 2 ? static_cast<int>(group) : kMostHeads; }

// Calls run with heads_at_once(group) as a constant.
template <typename Run>
inline void with_heads(int64_t group, Run&& run) {
  switch (heads_at_once(group)) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    default:
      return run(std::integral_constant<int, kMostHeads>{});
  }
}

// How the elements of a key are read and multiplied with those of a query.
template <typename T, typename Cache>
struct Products {
  using Query = Widened<T>;
  using Key = Widened<Cache>;
};
template <typename T>
struct Products<T, T> {
  using Query = Fastest<T>;
  using Key = Fastest<T>;
};

// Sizes of the arrays of one kv head, padded so that loops see whole vectors and blocks of heads.
struct Layout {
  int64_t heads;  // of the group, worked together
  int64_t group;
  int64_t width;  // of a row of head_dim elements

  explicit Layout(const DecodeAttention& args)
      : heads(heads_at_once(args.q_heads / args.kv_heads)),
        group(round_up(args.q_heads / args.kv_heads, heads)),
        width(round_up(args.head_dim, kLanes)) {}

  int64_t partial_floats() const { return round_up(group * (width + 2), kLanes); }
  int64_t scratch_floats() const { return group * (width + kSplit) + width; }
};

// What a split leaves for the merge: out = values / total, up to a factor 2^largest.
struct Partial {
  float* values;   // (group, width)
  float* largest;  // (group,) scores, in powers of 2
  float* total;    // (group,)

  Partial(float* data, const Layout& layout)
      : values(data),
        largest(values + layout.group * layout.width),
        total(largest + layout.group) {}
};

// What one thread works with.
struct Scratch {
  float* q;       // (group / heads, vectors of head_dim elements, heads, kLanes)
  float* scores;  // (group, kSplit), then the weights
  float* row;     // (width,), one rotated query or key

  Scratch(float* data, const Layout& layout)
      : q(data), scores(q + layout.group * layout.width), row(scores + layout.group * kSplit) {}
};

// The positions first..last that a sequence's new token sees, and the splits that cover them. With
// first > last it sees nothing, but its key is written all the same, so it has a split.
struct Span {
  int64_t first = 0;
  int64_t last = -1;
  int64_t oldest = 0;  // split
  int64_t splits = 0;  // 0: an idle row

  Span(const DecodeAttention& args, int64_t sequence) : last(args.positions[sequence]) {
    if (last < 0) return;
    const int64_t start = args.starts == nullptr ? 0 : args.starts[sequence];
    first = std::max({int64_t{0}, start, last - args.window + 1});
    oldest = std::min(first, last) / kSplit;
    splits = last / kSplit - oldest + 1;
  }
};

// ---- The new token.

// Writes x to `to`, turned by the angles of its position unless it is already, times `factor`, as
// the rope op would.
template <typename T>
void rotate_new(const DecodeAttention& args, int64_t position, const T* x, float factor, T* to) {
  if (args.cos != nullptr) {
    rotate(x, to, args.cos + position * args.stride_cos, args.sin + position * args.stride_sin,
           args.head_dim, args.interleaved, factor);
  } else {
    std::memcpy(to, x, args.head_dim * sizeof(T));
  }
}

// The group's queries, vectors of layout.heads heads side by side as score_keys reads them. What
// pads heads and rows is 0.
template <typename Query, typename T>
void prepare_queries(const DecodeAttention& args, const Layout& layout, int64_t sequence,
                     int64_t head, const Scratch& scratch) {
  const int64_t position = args.positions[sequence];
  const int64_t group = args.q_heads / args.kv_heads;
  const float factor = args.q_scale == nullptr ? 1.0f : args.q_scale[position];
  T* rotated = reinterpret_cast<T*>(scratch.row);
  std::memset(scratch.q, 0, layout.group * layout.width * sizeof(float));
  for (int64_t g = 0; g < group; ++g) {
    const T* from = static_cast<const T*>(args.q.data) + sequence * args.q.stride_token +
                    (head * group + g) * args.q.stride_head;
    rotate_new(args, position, from, factor, rotated);
    float* to = scratch.q + (g - g % layout.heads) * layout.width + g % layout.heads * kLanes;
    for (int64_t i = 0; i < args.head_dim; i += Query::kStep, to += layout.heads * kLanes) {
      store(to, Query::read(rotated + i, args.head_dim - i));
    }
  }
}

template <typename T, typename Cache>
void write_new(const DecodeAttention& args, const Pages& pages, int64_t sequence, int64_t head,
               const T* row) {
  const int64_t position = args.positions[sequence];
  for_runs<Cache>(args.ring, pages, sequence, head, position, position + 1,
                  [&](Cache* slot, int64_t, int64_t) {
                    write_row(row, slot, args.head_dim, scale_of(pages, head));
                  });
}

// `scratch` holds the rotated key, rounded as the rope op would.
template <typename T, typename Cache>
void write_new(const DecodeAttention& args, int64_t sequence, int64_t head, float* scratch) {
  const auto row = [&](const HeadRows& rows) {
    return static_cast<const T*>(rows.data) + sequence * rows.stride_token +
           head * rows.stride_head;
  };
  T* rotated = reinterpret_cast<T*>(scratch);
  rotate_new(args, args.positions[sequence], row(args.k), 1.0f, rotated);
  write_new<T, Cache>(args, args.ring.k, sequence, head, rotated);
  write_new<T, Cache>(args, args.ring.v, sequence, head, row(args.v));
}

// ---- Attention over the keys of one split.

template <typename Cache>
constexpr int64_t kLineElements = 64 / sizeof(Cache);  // of a cache line

// Fetches the cache line that begins at element `i` of a row, where one does.
template <typename Cache>
inline void fetch(const Cache* row, int64_t i) {
  if (i % kLineElements<Cache> == 0) __builtin_prefetch(row + i);
}

// Fetches the first rows, which no row before them fetches.
template <typename Cache>
inline void fetch_first(const Cache* const* rows, int64_t count, int64_t head_dim) {
  for (int64_t row = 0; row < std::min(count, kAhead<Cache>); ++row) {
    for (int64_t i = 0; i < head_dim; i += kLineElements<Cache>) fetch(rows[row], i);
  }
}

// scores[head][key] = factor * q[head] . rows[key] of kHeads heads and so many keys that one sum_each
// ends all products. The loop keeps its sums in registers only without a short read in it, which is
// a call: rows of whole vectors have their own.
template <typename Key, int kHeads, bool kWhole, typename Cache>
void score_keys(const float* q, const Cache* const* rows, int64_t head_dim, float factor,
                float* scores) {
  constexpr int kKeys = kLanes / kHeads;
  if (head_dim < 1) __builtin_unreachable();  // else the sums would start in memory
  Floats sums[kLanes] = {};
  for (int64_t i = 0; i < head_dim; i += Key::kStep, q += kHeads * kLanes) {
    Floats queries[kHeads];
    for (int head = 0; head < kHeads; ++head) queries[head] = load(q + head * kLanes);
    for (int key = 0; key < kKeys; ++key) {
      const Floats value = Key::read(rows[key] + i, kWhole ? Key::kStep : head_dim - i);
      fetch(rows[key + kAhead<Cache>], i);
      for (int head = 0; head < kHeads; ++head) {
        Floats& sum = sums[head * kKeys + key];
        sum = Key::add(sum, value, queries[head]);
      }
    }
  }
  const Floats products = sum_each(sums) * factor;
  for (int head = 0; head < kHeads; ++head) {
    for (int key = 0; key < kKeys; ++key) {
      scores[head * kSplit + key] = products[head * kKeys + key];
    }
  }
}

// Turns the scores of one head into weights 2^(score - largest). A NaN stays in weights and total.
void weigh(float* scores, int64_t keys, float* largest, float* total) {
  const int64_t padded = round_up(keys, kLanes);
  for (int64_t key = keys; key < padded; ++key) scores[key] = -kInfinity;
  Floats tops = broadcast(-kInfinity);
  for (int64_t key = 0; key < padded; key += kLanes) tops = larger(load(scores + key), tops);
  const float top = largest_of(tops);
  const float base = top == -kInfinity ? 0.0f : top;  // -inf - -inf would be NaN
  Floats sums = {};
  for (int64_t key = 0; key < padded; key += kLanes) {
    const Floats weight = exp2(load(scores + key) - base);
    store(scores + key, weight);
    sums += weight;
  }
  *largest = top;
  *total = sum(sums);
}

// sums[head] += weights[head][key] * rows[key] over all keys, for kHeads heads and the kCount
// vectors from column `first` on. A vector that stands alone may be short.
template <int kHeads, int kCount, typename Cache>
void add_values(const float* weights, const Cache* const* rows, int64_t keys, int64_t first,
                int64_t count, float* sums, int64_t width) {
  Floats sum[kHeads][kCount];
  for (int head = 0; head < kHeads; ++head) {
    for (int i = 0; i < kCount; ++i) sum[head][i] = load(sums + head * width + first + i * kLanes);
  }
  for (int64_t key = 0; key < keys; ++key) {
    const Cache* row = rows[key] + first;
    const Cache* ahead = rows[key + kAhead<Cache>] + first;
    for (int i = 0; i < kCount; ++i) {
      const Floats value = kCount == 1 ? load(row, count) : load(row + i * kLanes);
      fetch(ahead, i * kLanes);
      for (int head = 0; head < kHeads; ++head) {
        sum[head][i] += weights[head * kSplit + key] * value;
      }
    }
  }
  for (int head = 0; head < kHeads; ++head) {
    for (int i = 0; i < kCount; ++i) store(sums + head * width + first + i * kLanes, sum[head][i]);
  }
}

// Attends the `keys` rows of k and v with all heads of the group, whose queries are multiplied with
// `factor`. `k` is padded to whole vectors.
template <typename Key, int kHeads, typename Cache>
__attribute__((noinline)) void attend(const Layout& layout, int64_t head_dim, float factor,
                                      const Cache* const* k, const Cache* const* v, int64_t keys,
                                      const Scratch& scratch, const Partial& partial) {
  const bool whole = head_dim % Key::kStep == 0;
  for (int64_t tile = 0; tile < keys; tile += kTile) {
    const int64_t end = std::min(keys, tile + kTile);
    for (int64_t head = 0; head < layout.group; head += kHeads) {
      for (int64_t key = tile; key < end; key += kLanes / kHeads) {
        const float* q = scratch.q + head * layout.width;
        float* scores = scratch.scores + head * kSplit + key;
        if (whole) {
          score_keys<Key, kHeads, true>(q, k + key, head_dim, factor, scores);
        } else {
          score_keys<Key, kHeads, false>(q, k + key, head_dim, factor, scores);
        }
      }
    }
  }
  for (int64_t head = 0; head < layout.group; ++head) {
    weigh(scratch.scores + head * kSplit, keys, partial.largest + head, partial.total + head);
  }
  std::memset(partial.values, 0, layout.group * layout.width * sizeof(float));
  for (int64_t tile = 0; tile < keys; tile += kTile) {
    const int64_t count = std::min(keys - tile, kTile);
    for (int64_t head = 0; head < layout.group; head += kHeads) {
      const float* weights = scratch.scores + head * kSplit + tile;
      float* sums = partial.values + head * layout.width;
      int64_t i = 0;
      for (; i + kVectors * kLanes <= head_dim; i += kVectors * kLanes) {
        add_values<kHeads, kVectors>(weights, v + tile, count, i, kLanes, sums, layout.width);
      }
      for (; i < head_dim; i += kLanes) {
        add_values<kHeads, 1>(weights, v + tile, count, i, head_dim - i, sums, layout.width);
      }
    }
  }
}

// Points `rows` at positions first..end-1.
template <typename Cache>
void find_rows(const Ring& ring, const Pages& pages, int64_t sequence, int64_t head, int64_t first,
               int64_t end, const Cache** rows) {
  for_runs<Cache>(ring, pages, sequence, head, first, end,
                  [&](const Cache* row, int64_t, int64_t count) {
                    for (int64_t i = 0; i < count; ++i) *rows++ = row + i * pages.stride_row;
                  });
}

template <typename T, typename Cache>
void work_split(const DecodeAttention& args, const Layout& layout, int64_t sequence, int64_t head,
                const Span& span, int64_t split, const Scratch& scratch, const Partial& partial) {
  const int64_t first = std::max(span.first, split * kSplit);
  const int64_t end = std::min(span.last + 1, (split + 1) * kSplit);
  // No other split reads the slot that is written: it held the position that left the ring.
  if (end > span.last && args.k.data != nullptr) {
    write_new<T, Cache>(args, sequence, head, scratch.row);
  }
  const int64_t keys = std::max(int64_t{0}, end - first);
  // Rows of k up to a whole vector of scores, rows of v, and more for those who fetch ahead.
  const Cache* rows[2 * kSplit + kLanes + kAhead<Cache>];
  const Cache** k = rows;
  const Cache** v = k + round_up(keys, kLanes);
  if (keys > 0) {
    find_rows(args.ring, args.ring.k, sequence, head, first, end, k);
    find_rows(args.ring, args.ring.v, sequence, head, first, end, v);
    std::fill(k + keys, v, k[keys - 1]);
    std::fill_n(v + keys, kAhead<Cache>, v[keys - 1]);
  }
  fetch_first(k, keys, args.head_dim);
  using Product = Products<T, Cache>;
  prepare_queries<typename Product::Query, T>(args, layout, sequence, head, scratch);
  const float factor = args.scale * kLog2E * scale_of(args.ring.k, head);
  with_heads(layout.heads, [&](auto heads) {
    attend<typename Product::Key, heads>(layout, args.head_dim, factor, k, v, keys, scratch,
                                         partial);
  });
}

// ---- All splits together.

// Merges the partial results of one head of the group, which lie `step` floats apart.
template <typename T>
void merge(const Layout& layout, float* partials, int64_t step, int64_t splits, int64_t head,
           int64_t head_dim, float v_scale, T* out, float* lse) {
  const auto partial = [&](int64_t split) { return Partial(partials + split * step, layout); };
  float top = -kInfinity;
  for (int64_t s = 0; s < splits; ++s) top = std::max(top, partial(s).largest[head]);
  const float base = top == -kInfinity ? 0.0f : top;
  float total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) {
    float& largest = partial(s).largest[head];
    largest = exp2(broadcast(largest - base))[0];  // from now on the weight of the split
    total += partial(s).total[head] * largest;
  }
  const bool nothing = total == 0.0f;  // seen
  const float divisor = nothing ? 1.0f : total;
  for_vectors(head_dim, [&](int64_t i, int64_t count) {
    Floats sum = {};
    for (int64_t s = 0; s < splits; ++s) {
      sum += partial(s).largest[head] * load(partial(s).values + head * layout.width + i);
    }
    store(out + i, sum / divisor * v_scale, count);
  });
  *lse = nothing ? -kInfinity : (base + std::log2(total)) / kLog2E;
}

template <typename T, typename Cache>
void decode(const DecodeAttention& args, int threads) {
  const Layout layout(args);
  const int64_t pairs = args.batch * args.kv_heads;
  int64_t splits = 0;  // of the longest sequence
  int64_t keys = 0;
  for (int64_t sequence = 0; sequence < args.batch; ++sequence) {
    const Span span(args, sequence);
    splits = std::max(splits, span.splits);
    keys += std::max(int64_t{0}, span.last + 1 - span.first);
  }
  const int64_t step = layout.partial_floats();
  const Buffer partials(pairs * splits * step);
#pragma omp parallel num_threads(team(threads, 2 * keys * args.kv_heads * args.head_dim))
  {
    const Buffer buffer(layout.scratch_floats());
    const Scratch scratch(buffer.data(), layout);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < pairs * splits; ++unit) {
      const int64_t pair = unit / splits, split = unit % splits;
      const Span span(args, pair / args.kv_heads);
      if (split >= span.splits) continue;
      work_split<T, Cache>(args, layout, pair / args.kv_heads, pair % args.kv_heads, span,
                           span.oldest + split, scratch,
                           Partial(partials.data() + unit * step, layout));
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.batch * args.q_heads; ++row) {
      const int64_t group = args.q_heads / args.kv_heads;
      const int64_t pair = row / group;
      merge(layout, partials.data() + pair * splits * step, step,
            Span(args, pair / args.kv_heads).splits, row % group, args.head_dim,
            scale_of(args.ring.v, pair % args.kv_heads),
            static_cast<T*>(args.out) + row * args.head_dim, args.lse + row);
    }
  }
}

}  // namespace

void decode_attention(const DecodeAttention& args, int threads) {
  with_dtype(args.dtype, [&](auto element) {
    with_cache_of<decltype(element)>(args.ring.dtype, [&](auto stored) {
      decode<decltype(element), decltype(stored)>(args, threads);
    });
  });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

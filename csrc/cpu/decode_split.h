// How a kv head's group of queries attends the keys of one split of decode_attention.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/dot.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int64_t kSplit = 256;                       // positions
constexpr int64_t kTile = 32;                         // keys that go round the heads while in L1
constexpr int kMostHeads = kRegisters == 32 ? 4 : 2;  // of a group, in registers
constexpr int kVectors = 4;                           // of a value row in registers
// Keys between a row in use and the one being fetched.
template <typename Cache>
constexpr int64_t kAhead = 64 / sizeof(Cache);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Heads of a group that go through a split together: code exists for these numbers.
inline int heads_at_once(int64_t group) {
  return group <= 2 ? static_cast<int>(group) : kMostHeads;
}

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

// ---- Attention over the keys.

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

// scores[head][key] = factor * q[head] . rows[key] of kHeads heads and so many keys that one
// sum_each ends all products. The loop keeps its sums in registers only without a short read in it,
// which is a call: rows of whole vectors have their own.
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
inline void weigh(float* scores, int64_t keys, float* largest, float* total) {
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

// Attends the `keys` rows of k and v with all heads of the group. `factor` is that of the scores,
// and `k` is padded to whole vectors of them.
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

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

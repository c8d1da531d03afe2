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

#include "cpu/decode_split.h"
#include "cpu/dispatch.h"
#include "cpu/ring.h"
#include "cpu/rotate.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

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

// Writes x to `to`, turned by the angles of its position and times `factor` as the rope op would,
// unless it is turned already.
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

// ---- One split.

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

// What a thread of prefill_attention works in, and how two softmaxes become one.
#pragma once

#include <algorithm>

#include "cpu/attention_panel.h"
#include "cpu/buffer.h"
#include "cpu/prefill_tile.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int kBlock = 64;  // keys at once; blocks start at its multiples

// Memory for vectors, whose pieces are taken one after another.
class Memory {
 public:
  explicit Memory(int64_t vectors)
      : buffer_(vectors * kLanes), next_(reinterpret_cast<Floats*>(buffer_.data())) {}

  Floats* take(int64_t vectors) {
    next_ += vectors;
    return next_ - vectors;
  }

 private:
  Buffer buffer_;
  Floats* next_;
};

// How much a tile of a call may need.
struct Sizes {
  int64_t vectors;  // of rows
  int64_t stride;   // head_dim, rounded up to what `multiply` works at once

  int64_t state() const { return vectors * (stride + 2); }
  int64_t keys() const { return round_up((kBlock + kSums) * stride, kLanes) / kLanes; }
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

// Adds the softmax over later keys to that over earlier ones.
inline void merge(const Tile& tile, int64_t stride, const State& state, const State& later) {
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

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// Attention of a panel: a few vectors of query rows, one row a lane, over a block of keys.
//
// Everything lies with the rows along the vectors: queries are q[d][row], scores s[key][row],
// results values[d][row]. Both products are then `multiply` with another first matrix, and the
// softmax over keys runs down the vectors, so that no lane ever meets another: what a row gets
// depends on its own query and keys only, not on the rows beside it or on the panel's width.
#pragma once

#include "cpu/simd.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

// `multiply` holds kSums x width sums in registers, beside `width` vectors and one broadcast.
constexpr int kSums = kRegisters == 32 ? 8 : 4;
constexpr int kPanelWidth = 3;

// A block of keys and values, widened, rows kept kSums elements apart or a multiple of it.
struct Keys {
  const float* k;  // (count, stride); rows up to the next multiple of kSums are readable
  const float* v;  // (count, stride), zeros after the head
  int64_t stride;
  int64_t head_dim;
  int count;
  int first;      // position of the first key, counted like Panel::first
  bool finite_v;  // no value is NaN or infinite
};

// Rows of queries and their softmax so far, over keys j with first <= j < first + width.
struct Panel {
  const Floats* q;  // (head_dim, width), times scale * log2(e)
  const Ints* first;
  const Words* seen;
  Floats* largest;  // (width,), of the scores, in powers of two
  Floats* total;    // (width,), sum of 2^(score - largest)
  Floats* values;   // (stride, width), sum of 2^(score - largest) * v
};

// 2^x for x <= 0: 0 below -125, where the product of the last line could get denormal and slow.
inline Floats exp2_falling(Floats x) {
  const Floats shifter = broadcast(0x1.8p23f);  // adding it leaves the integer nearest to x
  const Floats shifted = x + shifter;
  const Floats power = exp2_fraction(x - (shifted - shifter));
  // The shifter's own bits leave at the top.
  const Floats whole = floats_of((words_of(shifted) << 23) + (127u << 23));
  return x < -125.0f ? Floats{} : power * whole;  // a NaN is not below
}

// What scores are taken relative to. Where no key was seen -inf - -inf would be NaN.
inline Floats base_of(Floats largest) { return largest == -INFINITY ? Floats{} : largest; }

// Lanes of panel vector i that see key j.
inline Ints sees(const Panel& panel, int i, int j) {
  return reinterpret_cast<Words>(j - panel.first[i]) < panel.seen[i];
}

// c[i][row] = sum over k of at(i, k) * b[k][row], on top of c[i][row] * decay[row] unless that is
// null, for i < rows, rounded up to a multiple of kSums. The sum runs in the order of k.
template <int kWidth, typename At>
inline void multiply(int64_t rows, int64_t depth, At&& at, const Floats* b, const Floats* decay,
                     Floats* c) {
  for (int64_t first = 0; first < rows; first += kSums, c += kSums * kWidth) {
    Floats sums[kSums][kWidth] = {};
    if (decay != nullptr) {
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < kWidth; ++j) sums[i][j] = c[i * kWidth + j] * decay[j];
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
        const Floats factor = broadcast(at(first + i, k));
#pragma GCC unroll 3
        for (int j = 0; j < kWidth; ++j) sums[i][j] += factor * b[k * kWidth + j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) c[i * kWidth + j] = sums[i][j];
    }
  }
}

// Turns scores (keys.count, kWidth) into weights 2^(score - largest), and returns in `decay` what
// older weights are worth now.
template <int kWidth>
inline void weigh(const Keys& keys, const Panel& panel, Floats* scores, Floats* decay) {
  Floats largest[kWidth], base[kWidth], sum[kWidth] = {};
  for (int i = 0; i < kWidth; ++i) largest[i] = panel.largest[i];
  for (int key = 0; key < keys.count; ++key) {
    for (int i = 0; i < kWidth; ++i) largest[i] = larger(scores[key * kWidth + i], largest[i]);
  }
  for (int i = 0; i < kWidth; ++i) base[i] = base_of(largest[i]);
  for (int key = 0; key < keys.count; ++key) {
    for (int i = 0; i < kWidth; ++i) {
      const Floats weight = exp2_falling(scores[key * kWidth + i] - base[i]);
      scores[key * kWidth + i] = weight;
      sum[i] += weight;
    }
  }
  for (int i = 0; i < kWidth; ++i) {
    decay[i] = exp2_falling(panel.largest[i] - base[i]);
    panel.total[i] = panel.total[i] * decay[i] + sum[i];
    panel.largest[i] = largest[i];
  }
}

// As `multiply` of values and weights, but what a row does not see is left out: 0 * NaN is NaN.
template <int kWidth>
inline void add_seen_values(const Keys& keys, const Panel& panel, const Floats* weights,
                            const Floats* decay) {
  for (int64_t d = 0; d < keys.head_dim; ++d) {
    for (int i = 0; i < kWidth; ++i) {
      Floats sum = panel.values[d * kWidth + i] * decay[i];
      for (int key = 0; key < keys.count; ++key) {
        const Floats value = broadcast(keys.v[key * keys.stride + d]);
        sum = sees(panel, i, keys.first + key) ? sum + value * weights[key * kWidth + i] : sum;
      }
      panel.values[d * kWidth + i] = sum;
    }
  }
}

// Adds a block of keys to the softmax of a panel; `masked` if a row of it misses one of them.
// `scores` has room for keys.count + kSums - 1 keys.
template <int kWidth>
inline void attend(const Keys& keys, const Panel& panel, bool masked, Floats* scores) {
  const float* k = keys.k;
  const float* v = keys.v;
  const int64_t stride = keys.stride;
  multiply<kWidth>(
      keys.count, keys.head_dim, [=](int64_t key, int64_t d) { return k[key * stride + d]; },
      panel.q, nullptr, scores);
  for (int key = 0; masked && key < keys.count; ++key) {
    for (int i = 0; i < kWidth; ++i) {
      Floats& score = scores[key * kWidth + i];
      score = sees(panel, i, keys.first + key) ? score : broadcast(-INFINITY);
    }
  }
  Floats decay[kWidth];
  weigh<kWidth>(keys, panel, scores, decay);
  if (masked && !keys.finite_v) return add_seen_values<kWidth>(keys, panel, scores, decay);
  multiply<kWidth>(
      keys.head_dim, keys.count, [=](int64_t d, int64_t key) { return v[key * stride + d]; },
      scores, decay, panel.values);
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

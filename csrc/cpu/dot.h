// Dot products of a few rows of x with kLanes rows of a weight that is streamed from memory.
//
// x is packed: up to kMaxRows of its rows lie interleaved, a vector of each in turn, so that one
// pointer walks along all of them and a vector of the weight, once in a register, serves them all.
// A pair of rows has kLanes partial sums, added up in the order of `sum_each`: its bits depend on
// `in` alone, not on how many rows there are.
#pragma once

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/simd.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int kMaxRows = 8;

// ---- How a vector of T is read, of x as of the weight, and multiplied.

// What `dot` wants to know of a weight's elements that are multiplied as they are: a vector from
// memory is one of floats. low_bit_dot.h has those of which a vector from memory gives several.
template <typename T>
struct Plain {
  using Element = T;
  using Vector = Floats;
  static constexpr int kCodes = 1;       // columns of an Element
  static constexpr int kParts = 1;       // vectors of floats that a vector from memory gives
  static constexpr int kVectors = 1;     // of packed x that belong to a vector from memory
  static constexpr bool kZeros = false;  // the last of these is multiplied with `Walk::zero`

  static Floats part(Floats vector, int) { return vector; }
};

template <typename T>
struct Widened : Plain<T> {
  static constexpr int kStep = kLanes;  // elements of a vector
  static constexpr int kLine = std::max<int>(64 / sizeof(T), kStep);

  static Floats read(const T* from, int64_t count) { return load(from, count); }
  static Floats add(Floats sum, Floats weight, Floats x) { return sum + weight * x; }
};

template <typename T>
struct FastestOf {
  using Product = Widened<T>;
};

#if defined(__AVX512BF16__)
// A lane holds two bf16, and gains the sum of two products at a time.
struct Pairs : Plain<BFloat16> {
  static constexpr int kStep = 2 * kLanes;
  static constexpr int kLine = kStep;

  static Floats read(const BFloat16* from, int64_t count) {
    const __mmask32 mask = count >= kStep ? ~0u : (1u << count) - 1;
    return (Floats)_mm512_maskz_loadu_epi16(mask, from);
  }
  static Floats add(Floats sum, Floats weight, Floats x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)x);
  }
};

template <>
struct FastestOf<BFloat16> {
  using Product = Pairs;
};
#endif

template <typename T>
using Fastest = typename FastestOf<T>::Product;

// ---- Packed rows.

// Rows that lie interleaved for so many: code exists for these numbers.
inline int padded_rows(int rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kMaxRows; }

// Floats that one packed row takes.
template <typename Product>
inline int64_t packed_size(int64_t in) {
  return round_up(in, Product::kStep) / Product::kStep * (Product::kVectors * kLanes);
}

// Packs the rows row(0) .. row(rows - 1); the last one also fills the places behind it.
template <typename Product, typename Row>
inline void pack(int rows, int64_t in, Row&& row, float* packed) {
  const int padded = padded_rows(rows);
  for (int r = 0; r < padded; ++r) {
    const typename Product::Element* from = row(std::min(r, rows - 1));
    float* to = packed + r * kLanes;
    for (int64_t i = 0; i < in; i += Product::kStep, to += padded * kLanes) {
      store(to, Product::read(from + i, in - i));
    }
  }
}

// ---- Dot products.

// GCC would load an operand again for each FMA that uses it, and 8 rows do not run as fast then.
inline Floats in_register(Floats value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#endif
  return value;
}

// Of a weight: row j starts at data + j * stride; only the first `count` rows exist. Rows of the
// same stride that are read afterwards start at `next`.
template <typename T>
struct WeightRows {
  const T* data;
  int64_t stride;
  int64_t count;
  const T* next;

  // Walks along the columns of rows, from a row and a column on.
  struct Walk {
    Walk(const WeightRows&, int64_t, int64_t) {}
    // Columns from here up to it are added up on their own, `limit` at most.
    int64_t stop(int64_t, int64_t limit) { return limit; }
    Floats zero(int) const { return Floats{}; }
    Floats scaled(int, Floats sum, Floats part) const { return sum + part; }
  };
};

// acc[r][s] gains the product of factor r and value s. Inlined, as acc is to stay in registers.
template <typename Product, int kRows, int kStreams>
__attribute__((always_inline)) inline void multiply_add(const float* factors,
                                                        const Floats (&values)[kStreams],
                                                        Floats (&acc)[kRows][kStreams]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Floats factor = in_register(load(factors + r * kLanes));
    for (int s = 0; s < kStreams; ++s) acc[r][s] = Product::add(acc[r][s], values[s], factor);
  }
}

// Lane j of out[r] becomes the product of packed row r and weight row j, or garbage from `count`
// on. On a machine with AVX-512 the weight comes at the speed of plain reading; 8 rows need 16
// FMAs for each 2 vectors of it, as much as two FMA units do in the time that reading takes.
template <typename Product, int kRows, typename Weight>
void dot_rows(const float* x, const Weight& weight, int64_t in, Floats* out) {
  using Element = typename Product::Element;
  constexpr int kStep = Product::kStep;
  constexpr int kVectors = Product::kVectors;
  constexpr int kCodes = Product::kCodes;
  // So many rows of the weight are streamed at once: the accumulators fit the registers.
  constexpr int kStreams = std::min(std::min(kLanes, 8), kRegisters / 2 / kRows);
  constexpr int kLine = Product::kLine;
  // Bytes of a row that are fetched ahead: the hardware stops at its end. Of 256, 512, 1024 and
  // 2048 these are the best for weights of 512 to 3584 columns on one core of an EPYC (Zen 5),
  // where 512 instead of 1024 takes 1.1 times as long with codes, and 1.4 with those of small
  // experts.
  constexpr int64_t kAhead = (sizeof(Element) == 1 ? 1024 : 512) / sizeof(Element) * kCodes;
  // More rows of x than these may follow and want the same weight. Else it goes past the caches,
  // which keep what the next calls read again: a token of a small mixture takes 0.88 of the time.
  constexpr int kLocality = kRows < kMaxRows ? 0 : 3;
  // All weight rows meet 16 KB of x before the next columns, so that these stay in L1.
  constexpr int64_t kPanel = 4096 / kRows;
  // So many products of a lane are added up on their own: long rows lose fewer bits. They end at
  // multiples of it wherever a panel or a group begins, so the bits do not depend on kRows.
  constexpr int64_t kSegment = 32 * kLanes;
  static_assert(kPanel % kSegment == 0 && kSegment % kLine == 0 && kLine % kStep == 0);
  const auto element = [](int64_t column) { return static_cast<uint64_t>(column) / kCodes; };
  Floats sums[kRows][kLanes] = {};
  for (int64_t first = 0; first < in; first += kPanel) {
    const int64_t end = std::min(in, first + kPanel);
    // What is fetched ahead lies so many times kStreams rows later once these columns end: where
    // there are fewer than kAhead, in the same column.
    const int64_t columns = end - first;
    const int64_t turns = std::max<int64_t>(1, kAhead / columns);
    const int64_t ahead = std::min(kAhead, turns * columns);
    const Element* const after = end < in ? weight.data + element(end) : weight.next;
    for (int j = 0; j < kLanes; j += kStreams) {
      const Element* rows[kStreams];
      for (int s = 0; s < kStreams; ++s) {
        rows[s] = weight.data + std::min<int64_t>(j + s, weight.count - 1) * weight.stride;
      }
      const int64_t later = j + turns * kStreams;
      const Element* const target = later < kLanes
                                        ? weight.data + element(first) + later * weight.stride
                                        : after + (later - kLanes) * weight.stride;
      const int64_t beyond = target - (rows[0] + element(first)) - turns * columns / kCodes;
      typename Weight::Walk walk(weight, j, first);
      Floats totals[kRows][kStreams];
      for (int r = 0; r < kRows; ++r) {
        for (int s = 0; s < kStreams; ++s) totals[r][s] = sums[r][j + s];
      }
      for (int64_t i = first; i < end;) {
        const int64_t stop = walk.stop(i, std::min(end, (i | (kSegment - 1)) + 1));
        Floats acc[kRows][kStreams];
        for (auto& row : acc) {
          for (Floats& sum : row) sum = Floats{};  // `= {}` would put them into memory
        }
        const auto step = [&](int64_t at, int64_t count) __attribute__((always_inline)) {
          typename Product::Vector vectors[kStreams];
          for (int s = 0; s < kStreams; ++s) {
            vectors[s] = Product::read(rows[s] + element(at), count);
          }
          const float* packed = x + uint64_t(at) / kStep * (kVectors * kRows * kLanes);
#pragma GCC unroll 8
          for (int part = 0; part < Product::kParts; ++part) {
            Floats values[kStreams];
            for (int s = 0; s < kStreams; ++s) values[s] = Product::part(vectors[s], part);
            multiply_add<Product>(packed + part * kRows * kLanes, values, acc);
          }
          if constexpr (Product::kZeros) {
            Floats zeros[kStreams];
            for (int s = 0; s < kStreams; ++s) zeros[s] = walk.zero(s);
            multiply_add<Widened<float>>(packed + (kVectors - 1) * kRows * kLanes, zeros, acc);
          }
        };
        for (; i + kLine <= stop; i += kLine) {
          const int64_t next = i + ahead < end ? 0 : beyond;
          for (int s = 0; s < kStreams; ++s) {
            __builtin_prefetch(rows[s] + element(i + ahead) + next, 0, kLocality);
          }
#pragma GCC unroll 8
          for (int k = 0; k < kLine; k += kStep) step(i + k, kStep);
        }
        for (; kLine > kStep && i + kStep <= stop; i += kStep) step(i, kStep);
        if (i < stop) step(i, stop - i);
        i = stop;
        for (int r = 0; r < kRows; ++r) {
          for (int s = 0; s < kStreams; ++s) {
            totals[r][s] = walk.scaled(s, totals[r][s], acc[r][s]);
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int s = 0; s < kStreams; ++s) sums[r][j + s] = totals[r][s];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = sum_each(sums[r]);
}

// As above for `rows` packed rows; fills padded_rows(rows) of `out`.
template <typename Product, typename Weight>
inline void dot(int rows, const float* x, const Weight& weight, int64_t in, Floats* out) {
  switch (padded_rows(rows)) {
    case 1:
      return dot_rows<Product, 1>(x, weight, in, out);
    case 2:
      return dot_rows<Product, 2>(x, weight, in, out);
    case 4:
      return dot_rows<Product, 4>(x, weight, in, out);
    default:
      return dot_rows<Product, kMaxRows>(x, weight, in, out);
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// Dot products with a low-bit weight, whose codes become floats between memory and the FMA.
//
// A vector from memory gives one vector of 8-bit codes, and eight of 4-bit codes: its lane is a
// 32-bit word, whose codes stand for eight neighbouring columns. x is packed in that order, so no
// code is moved to another lane:
//
//     column    0  1  2  ...  7 |  8  9 10 ... 15 | 16 ...
//     lane      0  0  0  ...  0 |  1  1  1 ...  1 |  2 ...        x[0], x[8], x[16], .. come first
//     part      0  1  2  ...  7 |  0  1  2 ...  7 |  0 ...
//
// The products of a group are added up on their own and multiplied with its scale, once; where a
// vector holds several groups (a word never does) each lane has its own scale.
#pragma once

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/dot.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int kWordCodes = 8;  // 4-bit codes of a word

// ---- The formats: their Products for `dot`.

template <typename T, bool kWithZeros>
struct LowBitFormat {
  using Element = T;
  using Column = float;  // of x, before it is packed
  static constexpr bool kZeros = kWithZeros;
  static constexpr float kUnit = 1;  // the scale of a group is so many times that of its values

  static Floats add(Floats sum, Floats weight, Floats x) { return sum + weight * x; }
  // What a lane of packed x holds for a part of its columns.
  static float packed(const Column* columns, int part) { return columns[part]; }
};

// The first `count` lanes, 0 behind them, of what load_all reads for all of them.
template <typename T, typename Load>
inline auto load_some(const T* from, int64_t count, Load&& load_all) {
  if (count >= kLanes) return load_all(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load_all(padded);
}

// The values are code - 8. Zero points are not taken from each value: 8 - zero is multiplied with
// the sum of the word's x, once for eight codes.
template <bool kZeros>
struct Int4 : LowBitFormat<uint8_t, kZeros> {
  using Vector = Words;
  static constexpr int kCodes = 2;
  static constexpr int kParts = kWordCodes;
  static constexpr int kVectors = kParts + kZeros;
  static constexpr int kStep = kWordCodes * kLanes;
  static constexpr int kLine = kStep;
  static constexpr int kZero = 8;
  using Zero = uint8_t;

  static Words read(const uint8_t* from, int64_t count) {
    if (count < kStep) {
      uint8_t padded[kStep / kCodes] = {};
      std::memcpy(padded, from, count / kCodes);
      return read(padded, kStep);
    }
    Words words;
    std::memcpy(&words, from, sizeof(words));
    return words;
  }
  static Floats part(Words words, int part) {
#if defined(__AVX512F__)
    // One instruction looks up the low four bits of each lane, whatever lies above them.
    const Floats values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (Floats)_mm512_maskz_permutexvar_ps(-1, (__m512i)(words >> (4 * part)), (__m512)values);
#else
    // Codes with their highest bit inverted are two's complement.
    const Ints high = reinterpret_cast<Ints>((words ^ 0x88888888u) << (28 - 4 * part));
    return __builtin_convertvector(high >> 28, Floats);
#endif
  }
};

template <bool kZeros>
struct Int8Codes : LowBitFormat<int8_t, kZeros> {
  using Vector = Ints;
  static constexpr int kCodes = 1;
  static constexpr int kParts = 1;
  static constexpr int kVectors = 1;
  static constexpr int kStep = kLanes;
  static constexpr int kLine = 64;
  static constexpr int kZero = 0;
  using Zero = int8_t;

  static Ints read(const int8_t* from, int64_t count) {
    return load_some(from, count, [](const int8_t* all) { return load_ints(all); });
  }
  static Floats part(Ints codes, int) { return __builtin_convertvector(codes, Floats); }
};

struct Float8Codes : LowBitFormat<Float8, false> {
  using Vector = Floats;
  static constexpr int kCodes = 1;
  static constexpr int kParts = 1;
  static constexpr int kVectors = 1;
  static constexpr int kStep = kLanes;
  static constexpr int kLine = 64;
  static constexpr int kZero = 0;
  using Zero = int8_t;
  static constexpr float kUnit = 256;

  static Floats read(const Float8* from, int64_t count) {
    return load_some(from, count, [](const Float8* all) { return load_256th(all); });
  }
  static Floats part(Floats codes, int) { return codes; }
};

template <typename T, bool kZeros>
struct FastestInt4 {
  using Format = Int4<kZeros>;
};

#if defined(__AVX512BF16__)
using Halves = uint16_t __attribute__((vector_size(64)));

// A look-up finds the values of two codes of a lane, four columns apart, and their products with
// two columns of x in bf16 are added at once. In bf16 all these values are exact.
template <bool kZeros>
struct Int4Pairs : Int4<kZeros> {
  using Column = BFloat16;
  static constexpr int kParts = kWordCodes / 2;
  static constexpr int kVectors = kParts + kZeros;

  static Floats part(Words words, int part) {
    // -8 to 7 as bf16, twice: it looks at five bits, of which four are the code.
    const Halves values = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  //
                           0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,  //
                           0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  //
                           0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const auto codes = (__m512i)(words >> (4 * part));
    return (Floats)_mm512_maskz_permutexvar_epi16(-1, codes, (__m512i)values);
  }
  static Floats add(Floats sum, Floats weight, Floats x) { return Pairs::add(sum, weight, x); }
  static float packed(const BFloat16* columns, int part) {
    return float_of(columns[part].bits | uint32_t{columns[part + kParts].bits} << 16);
  }
};

template <bool kZeros>
struct FastestInt4<BFloat16, kZeros> {
  using Format = Int4Pairs<kZeros>;
};
#endif

// Calls run(Format{}) with that of weights which have such codes, and of which some have zeros, for
// rows of T.
template <typename T, typename Run>
inline void with_format(Dtype codes, bool zeros, Run&& run) {
  switch (codes) {
    case Dtype::kInt4:
      return zeros ? run(typename FastestInt4<T, true>::Format{})
                   : run(typename FastestInt4<T, false>::Format{});
    case Dtype::kInt8:
      return zeros ? run(Int8Codes<true>{}) : run(Int8Codes<false>{});
    case Dtype::kFloat8:
      return run(Float8Codes{});
    default:
      throw std::invalid_argument("codes: expected int4, int8 or float8");
  }
}

// ---- Packed rows of x.

// Packs the rows row(0) .. row(rows - 1) in the order of their codes; perm may be null.
template <typename Format, typename Row>
inline void pack_in_code_order(int rows, int64_t in, const int32_t* perm, Row&& row,
                               float* packed) {
  using Column = typename Format::Column;
  constexpr int kParts = Format::kParts;
  constexpr int kWord = Format::kStep / kLanes;  // neighbouring columns of a lane
  const int padded = padded_rows(rows);
  for (int r = 0; r < padded; ++r) {
    const auto* from = row(std::min(r, rows - 1));
    float* to = packed + r * kLanes;
    for (int64_t first = 0; first < in; first += Format::kStep) {
      Column columns[Format::kStep] = {};  // 0 behind the last one
      const int count = static_cast<int>(std::min<int64_t>(Format::kStep, in - first));
      if (perm == nullptr) {
        for_vectors(count, [&](int64_t i, int64_t left) {
          store(columns + i, load(from + first + i, left));
        });
      } else {
        for (int i = 0; i < count; ++i) {
          columns[i] = from_float<Column>(to_float(from[perm[first + i]]));
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int part = 0; part < kParts; ++part) {
          to[part * padded * kLanes + lane] = Format::packed(columns + lane * kWord, part);
        }
      }
      if constexpr (Format::kVectors > kParts) {
        for (int lane = 0; lane < kLanes; ++lane) {
          float total = 0;
          for (int i = 0; i < kWord; ++i) total += to_float(columns[lane * kWord + i]);
          to[kParts * padded * kLanes + lane] = total;
        }
      }
      to += Format::kVectors * padded * kLanes;
    }
  }
}

// ---- Scales.

// How the rows of a weight are cut into groups, and into spans of columns in which a lane has one
// scale: a group of columns, or one vector of words where that holds several groups.
template <typename Format>
struct Groups {
  Groups(int64_t in, int64_t group_size) : count(in / group_size), span(group_size) {
    if (Format::kParts > 1 && count > 1 && group_size % Format::kStep != 0) span = Format::kStep;
    for (int64_t column = 0; column < in; column += span) {
      const int64_t first = column / group_size;
      Words group_of = {};
      for (int lane = 0; lane < kLanes && span != group_size; ++lane) {
        // Codes behind the last column are multiplied with 0: any scale that is a number will do.
        const int64_t group = (column + lane * kWordCodes) / group_size;
        group_of[lane] = static_cast<uint32_t>(std::min(group, count - 1) - first);
      }
      spans.push_back({first, group_of});
    }
  }

  struct Span {
    int64_t first;  // its first group
    Words lanes;    // the group of each lane, counted from there
  };

  int64_t count;  // groups of a row
  int64_t span;   // columns of a span
  std::vector<Span> spans;
};

// Lane i is from[lanes[i]].
inline Floats look_up(const float* from, Words lanes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_permutexvar_ps(-1, (__m512i)lanes, (__m512)load(from));
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps((__m256)load(from), (__m256i)lanes);
#else
  return Floats{from[lanes[0]], from[lanes[1]], from[lanes[2]], from[lanes[3]]};
#endif
}

// kLanes rows of a weight, from `data` on; only the first `count` exist.
template <typename Format>
struct LowBitRows {
  const typename Format::Element* data;
  int64_t stride;
  int64_t count;
  const typename Format::Element* next;  // as in WeightRows
  const Groups<Format>& groups;
  const float* scales;  // (kLanes, groups.count), a vector behind them readable
  const float* zeros;   // likewise; garbage without Format::kZeros

  // Walks from span to span.
  class Walk {
   public:
    Walk(const LowBitRows& rows, int64_t row, int64_t column)
        : count_(rows.groups.count),
          size_(rows.groups.span),
          end_((column / size_ + 1) * size_),
          span_(&rows.groups.spans[column / size_]),
          scales_(rows.scales + row * count_),
          zeros_(rows.zeros + row * count_) {}

    int64_t stop(int64_t column, int64_t limit) {
      if (column == end_) {
        end_ += size_;
        ++span_;
      }
      return std::min(limit, end_);
    }
    Floats zero(int row) const { return Format::kZeros ? of_row(zeros_, row) : Floats{}; }
    Floats scaled(int row, Floats sum, Floats part) const {
      return sum + part * of_row(scales_, row);
    }

   private:
    Floats of_row(const float* values, int row) const {
      return look_up(values + span_->first + row * count_, span_->lanes);
    }

    const int64_t count_;
    const int64_t size_;
    int64_t end_;
    const typename Groups<Format>::Span* span_;
    const float* scales_;
    const float* zeros_;
  };
};

// Floats of memory that `low_bit_rows` wants.
template <typename Format>
inline int64_t scales_floats(const Groups<Format>& groups) {
  return (Format::kZeros ? 2 : 1) * kLanes * (groups.count + 1);
}

// Rows first .. first + count - 1 (kLanes at most) of a weight; those from `next` on are read
// afterwards. Rows are counted over all experts. Scales and zeros go to `scratch`.
template <typename Format>
LowBitRows<Format> low_bit_rows(const LowBit& weight, const Groups<Format>& groups, int64_t in,
                                int64_t first, int64_t count, int64_t next, float* scratch) {
  using Element = typename Format::Element;
  count = std::min<int64_t>(count, kLanes);
  const int64_t stride = in / Format::kCodes;
  const int64_t begin = first * groups.count, size = count * groups.count;
  float* zeros = scratch + kLanes * (groups.count + 1);
  with_dtype(weight.scale_dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(weight.scales) + begin;
    for_vectors(size, [&](int64_t i, int64_t left) {
      store(scratch + i, load(from + i, left) * Format::kUnit);
    });
  });
  if constexpr (Format::kZeros) {
    const auto* from = static_cast<const typename Format::Zero*>(weight.zeros) + begin;
    for (int64_t i = 0; i < size; ++i) {
      zeros[i] = weight.zeros == nullptr ? 0 : Format::kZero - from[i];
    }
  }
  const auto* data = static_cast<const Element*>(weight.qweight);
  return {data + first * stride, stride, count, data + next * stride, groups, scratch, zeros};
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

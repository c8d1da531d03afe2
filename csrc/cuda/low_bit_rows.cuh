// Products of rows of a low-bit weight (ops/low_bit.py draws its layout) and up to 8 tokens.
//
// A warp has 16 rows and takes 64 bytes of each at a step: 128 codes of 4 bits, 64 of 8. They come
// by asynchronous copies into a ring in shared memory of the warp's own, so that what is on its way
// needs no registers; ldmatrix then hands each lane a word of codes of every 16 bytes. All lanes of
// a row thus hold codes of one group, whose products are summed by themselves. Codes less zeros are
// small integers, exact in 16 bits, and so tensor cores multiply exactly; float32 sums of a group
// are then multiplied by its scale in float32.
//
// Bytes in flight. 4.8 TB/s (H200) over 132 multiprocessors are 36 KB in the microsecond that a
// loaded memory takes to answer; a block of 8 warps has 32 KB on their way, and two or three (80
// registers a thread) share a multiprocessor.
//
// Arithmetic. At that rate, and 1.755 GHz, a multiprocessor has 198 issue slots for the kilobyte of
// codes of a step, 6 more for each 32 bytes of scales. Plain float would take a conversion and an
// fma for each of its 2048 (4 bits) weights / 32 lanes, 128 before any load of x, and 64 for each
// token more. On tensor cores converting is nearly all, the same for 1 token and 8. A step on
// sm_90a, bf16, without a perm, in instructions a warp:
//     4 bits, groups of 128    199 of 204 slots: 88 make integers of the codes, 16 pair up x
//     4 bits, groups of 32     263 of 222: there instructions bound, not memory
//     8 bits, integer          207 of 198: both
//     8 bits, e4m3             192 of 198
// Sums of 16-bit products (half2) would take fewer, and lose bits that a group's sum needs. Not
// measured.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/and_or.cuh"
#include "cuda/async_copy.cuh"
#include "cuda/cache_codes.cuh"
#include "cuda/masked_load.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "launchers.h"

namespace mistral_kernels::cuda {

// Beside Int8 and Float8: two codes in a byte.
struct Int4 {
  uint8_t bits;
};

// The layout of a step, in codes.
template <typename Codes>
struct Step {
  static constexpr int kWord = std::is_same_v<Codes, Int4> ? 8 : 4;  // of 4 bytes: a lane's
  static constexpr int kPairs = kWord / 2;                           // registers of 16-bit numbers
  static constexpr int kChunk = 4 * kWord;                           // of 16 bytes: a copy
  static constexpr int kCodes = 4 * kChunk;                          // of a row at a step
};

constexpr int kRingSteps = 4;                      // that a warp has on their way
constexpr int kRingVectors = kRingSteps * 4 * 16;  // of 16 bytes, of a warp

// ---- Codes into T.

template <typename T>
__device__ uint32_t minus(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  return bits_as<uint32_t>(__hsub2(bits_as<Pair>(a), bits_as<Pair>(b)));
}

// Two T that count in ones, from 1024 (fp16) or 128 (bf16) on: the code goes in by an or.
template <typename T>
constexpr uint32_t kCounted = std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;

// A zero as `widen` wants it, from the byte it is stored in.
template <typename T, typename Codes>
__device__ uint32_t widened_zero(uint32_t byte) {
  if constexpr (std::is_same_v<Codes, Int4>) {
    return kCounted<T> + byte * 0x10001u;
  } else {
    const auto zero = static_cast<float>(static_cast<int8_t>(byte));
    return packed<T>(zero, zero);
  }
}

// The codes of a word less `zero`, exactly: pair i is codes i and i + kPairs.
template <typename T, typename Codes>
__device__ void widen(uint32_t word, uint32_t zero, uint32_t (&pairs)[Step<Codes>::kPairs]) {
  if constexpr (std::is_same_v<Codes, Int4>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = minus<T>(and_or(word >> 4 * i, 0x000f000fu, kCounted<T>), zero);
    }
  } else {
    pairs[0] = widened<T, Codes, false>(word);
    pairs[1] = widened<T, Codes, true>(word);
    if constexpr (std::is_same_v<Codes, Int8>) {
      for (uint32_t& pair : pairs) pair = minus<T>(pair, zero);
    }
  }
}

__device__ inline float scale_of(uint32_t bits, Dtype dtype) {
  const float half = __half2float(bits_as<__half>(static_cast<uint16_t>(bits)));
  const float other = bits_as<float>(bits << (dtype == Dtype::kFloat32 ? 0 : 16));
  return dtype == Dtype::kFloat16 ? half : other;
}

// ---- Rows.

// A lane's part. With g = lane / 4 and t = lane % 4 it copies the chunks t of rows g and g + 8,
// reads x of token g, and gets the sums of rows g and g + 8 for tokens 2t and 2t + 1.
//
// kUnits: in how many parts a step is summed, so that no part has columns of two groups. The four
// lanes of a row share the work of reading scales: each has those of one of the next four units.
template <typename T, typename Codes, int kUnits>
class LowBitRows {
  using Layout = Step<Codes>;
  static constexpr int kUnitChunks = 4 / kUnits;
  static constexpr int kTurn = 4 / kUnits;  // steps that four units make
  static constexpr bool kHasZeros = !std::is_same_v<Codes, Float8>;
  static constexpr uint32_t kMiddle = std::is_same_v<Codes, Int4> ? 8 : 0;  // zero, if not given

 public:
  // rows: the lane's two, of all the weight's. x: of token g. perm: of these rows, or null. Rows
  // and tokens that do not exist may be given as any others: their sums are nobody's. ring: of the
  // block.
  __device__ LowBitRows(const LowBit& weight, const int64_t (&rows)[2], const T* x,
                        const int32_t* perm, int size, uint4* ring)
      : weight_(weight), x_(x), perm_(perm), ring_(ring), size_(size) {
    const int lane = threadIdx.x % kWarpThreads;
    word_ = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      codes_[i] = static_cast<const uint8_t*>(weight.qweight) + rows[i] * bytes_of(size);
      groups_[i] = rows[i] * (size / static_cast<int>(weight.group_size));
    }
    // Row r keeps chunk c at place c ^ (r / 2 % 4), so that 8 rows of a chunk lie in all the banks.
    const int first = threadIdx.x / kWarpThreads * kRingVectors;
    to_ = first + lane / 4 * 4 + (word_ ^ lane / 8 % 4);
    from_ = first + lane % 16 * 4 + (lane / 16 ^ lane % 16 / 2 % 4);
  }

  // sums += rows * x over every `shares`-th step, from step `first` on. All that moves along does
  // so by additions: computed anew, addresses would take half as many instructions as the codes.
  __device__ void multiply(int first, int shares, float (&sums)[4]) {
    const int stride = shares * Layout::kCodes;
    int k = first * Layout::kCodes;
    x_ += perm_ != nullptr ? 0 : k + word_ * Layout::kWord;
    const int chunk = word_ * Layout::kChunk;
    if (k + chunk < size_) advance_codes(k + chunk);
#pragma unroll
    for (int i = 0; i < kRingSteps; ++i) copy_step(k + chunk + i * stride, stride);

    const auto group_size = static_cast<int>(weight_.group_size);
    const int unit = word_ / kUnits * stride + word_ % kUnits * kUnitChunks * Layout::kChunk;
    Group group{(k + unit) / group_size, (k + unit) % group_size};
    const Group advance{kTurn * stride / group_size, kTurn * stride % group_size};
    for (int64_t& number : groups_) number += group.number;
    RawScales raw{{0, 0}, {kMiddle, kMiddle}};
    load_scales(k + unit, raw);
    Scales scales;
    for (int step = 0; k < size_; ++step) {
      uint32_t x[4][Layout::kPairs];
      load_x(k, x);
      wait_copies<kRingSteps - 1>();
      __syncwarp();  // the other lanes' copies of this step are there
      uint32_t words[4][2];
      load_words(words);
      __syncwarp();  // and are read before they are written over
      copy_step(k + chunk + kRingSteps * stride, stride);
      x_ += perm_ != nullptr ? 0 : stride;
      if (step % kTurn == 0) {
        scales = Scales(raw, weight_.scale_dtype);
        const int groups = group.advance(advance, group_size);
        for (int64_t& number : groups_) number += groups;
        load_scales(k + unit + kTurn * stride, raw);
      }
      k += stride;
      multiply_step(words, x, scales, step % kTurn * kUnits, sums);
    }
    wait_copies<0>();  // of nothing, from behind the end: the ring is free
  }

 private:
  // The group of a column, moved along without dividing.
  struct Group {
    int number;
    int column;  // within it

    // By how many groups.
    __device__ int advance(const Group& by, int size) {
      column += by.column;
      const bool next = column >= size;
      column -= next ? size : 0;
      return by.number + next;
    }
  };

  // Bits as they lie in memory, of both rows: nothing waits for them before the next turn.
  struct RawScales {
    uint32_t scale[2];
    uint32_t zero[2];
  };

  struct Scales {
    float scale[2];
    uint32_t zero[2];

    Scales() = default;
    __device__ Scales(const RawScales& raw, Dtype dtype) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = scale_of(raw.scale[i], dtype);
        zero[i] = widened_zero<T, Codes>(raw.zero[i]);
      }
    }
  };

  static __device__ int bytes_of(int codes) { return codes / Layout::kChunk * 16; }

  __device__ void advance_codes(int by) {
#pragma unroll
    for (const uint8_t*& codes : codes_) codes += bytes_of(by);
  }

  // Copies the lane's chunks, at column k, of the next step; 0 behind the end.
  __device__ void copy_step(int k, int stride) {
#pragma unroll
    for (int i = 0; i < 2; ++i) copy_async_16(ring_ + to_ + i * 32, codes_[i], k < size_);
    commit_copies();
    to_ = next_place(to_);
    if (k + stride < size_) advance_codes(stride);
  }

  // The same place of the next step in the warp's ring.
  static __device__ int next_place(int place) {
    constexpr int kMask = kRingVectors - 1;
    return (place & ~kMask) | ((place + kRingVectors / kRingSteps) & kMask);
  }

  // Words `word_` of the four chunks of both rows.
  __device__ void load_words(uint32_t (&words)[4][2]) {
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk += 2) {
      uint32_t r[4];
      load_matrix_4(r, ring_ + (from_ ^ chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) words[chunk + i / 2][i % 2] = r[i];
    }
    from_ = next_place(from_);
  }

  // x of the columns of `words`, in the pairs of `widen`; 0 behind the end.
  __device__ void load_x(int k, uint32_t (&pairs)[4][Layout::kPairs]) const {
    uint32_t x[4][Layout::kPairs];
    if (perm_ != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) gather_x(k + i * Layout::kChunk, x[i]);
    } else if (k + Layout::kCodes <= size_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) load_x_of_chunk(x_ + i * Layout::kChunk, true, x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_x_of_chunk(x_ + i * Layout::kChunk, k + i * Layout::kChunk < size_, x[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int pair = 0; pair < Layout::kPairs; ++pair) {
        const uint32_t first = x[i][pair / 2];
        const uint32_t second = x[i][pair / 2 + Layout::kPairs / 2];
        pairs[i][pair] = __byte_perm(first, second, pair % 2 ? 0x7632 : 0x5410);
      }
    }
  }

  static __device__ void load_x_of_chunk(const T* from, bool keep, uint32_t (&x)[Layout::kPairs]) {
    if constexpr (Layout::kWord == 8) {
      const uint4 found = load_cached_16(from, keep);
      memcpy(x, &found, sizeof(x));
    } else {
      const uint2 found = load_cached_8(from, keep);
      memcpy(x, &found, sizeof(x));
    }
  }

  __device__ void gather_x(int chunk, uint32_t (&x)[Layout::kPairs]) const {
    T values[Layout::kWord];
#pragma unroll
    for (int i = 0; i < Layout::kWord; ++i) {
      values[i] = chunk < size_ ? x_[perm_[chunk + word_ * Layout::kWord + i]] : T(0.0f);
      if (i % 4 == 3) __syncwarp();  // addresses of more would not fit in registers
    }
    memcpy(x, values, sizeof(x));
  }

  // Those of column k; behind the end they stay as they are.
  __device__ void load_scales(int k, RawScales& raw) const {
    if (k >= size_) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      raw.scale[i] = weight_.scale_dtype == Dtype::kFloat32
                         ? static_cast<const uint32_t*>(weight_.scales)[groups_[i]]
                         : static_cast<const uint16_t*>(weight_.scales)[groups_[i]];
      if (kHasZeros && weight_.zeros != nullptr) {
        raw.zero[i] = static_cast<const uint8_t*>(weight_.zeros)[groups_[i]];
      }
    }
  }

  __device__ void multiply_step(const uint32_t (&words)[4][2],
                                const uint32_t (&x)[4][Layout::kPairs], const Scales& own,
                                int first_unit, float (&sums)[4]) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      float part[4] = {};
      const int lane = first_unit + unit;  // of the row's four, that has the unit's scales
      const uint32_t zero[2] = {__shfl_sync(kAllLanes, own.zero[0], lane, 4),
                                __shfl_sync(kAllLanes, own.zero[1], lane, 4)};
#pragma unroll
      for (int chunk = unit * kUnitChunks; chunk < (unit + 1) * kUnitChunks; ++chunk) {
        uint32_t upper[Layout::kPairs];
        uint32_t lower[Layout::kPairs];
        widen<T, Codes>(words[chunk][0], zero[0], upper);
        widen<T, Codes>(words[chunk][1], zero[1], lower);
#pragma unroll
        for (int i = 0; i < Layout::kPairs; i += 2) {
          mma_16x8x16<T>(part, {upper[i], lower[i], upper[i + 1], lower[i + 1]},
                         {x[chunk][i], x[chunk][i + 1]});
        }
      }
      const float scale[2] = {__shfl_sync(kAllLanes, own.scale[0], lane, 4),
                              __shfl_sync(kAllLanes, own.scale[1], lane, 4)};
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += scale[i / 2] * part[i];
    }
  }

  const LowBit& weight_;
  const uint8_t* codes_[2];  // the chunks to copy next
  int64_t groups_[2];        // of the next step, among all of the weight
  const T* x_;               // of the next step, or the whole row if there is a perm
  const int32_t* perm_;
  uint4* ring_;
  int size_;
  int word_;  // t
  int to_;    // places in the ring: of the chunk to copy next
  int from_;  // of the row whose address ldmatrix wants of the lane
};

}  // namespace mistral_kernels::cuda

// linear_low_bit on the CPU for few rows, and what many rows want before torch multiplies them.
//
// The codes are read from memory once for each kRowsAtOnce rows: out * in / 2 bytes of 4 bits. For
// one row a core with AVX-512 has to issue, on its two vector ports and for each 64 bytes,
//     4 bits (128 weights): 8 look-ups, 7 shifts, 8 FMAs and 1 for the scales, 12 cycles, and half
//         of each for x in bf16 where there are instructions for that;
//     int8 (64 weights): 4 widenings, 4 conversions and 4 FMAs, 6 cycles;
//     fp8 (64 weights): 4 widenings, shifts, masks and FMAs, 4 conversions of two each, 12 cycles.
// At 2.5 GHz that is 13, 27 and 13 GB/s where a core reads 12: memory is the limit of int8 and just
// about that of the others, so one row was to take 1/2 and 1/4 of the time of bf16. Measured, one
// row, one thread of a Xeon (Cascade Lake) that others used too, CPU time in turns, weights of
// (7168, 1024) and (1024, 3584) from memory, 2026-11-22: bf16 reads 9 to 12 GB/s; int8 takes
// 1 / 1.6 to 1 / 1.8 of its time, fp8 1 / 1.4 to 1 / 1.6, int4 of whole rows 1 / 2.5 to 1 / 3.1,
// g128 1 / 2.1 to 1 / 2.9, g32 1 / 2.0 to 1 / 2.7. From the caches 4 bits come at 10.5 GB/s by
// whole rows and at 9 by groups of 128; on an EPYC (Zen 5) of which a core reads 40 GB/s at 31 and
// 28, with x in bf16 at 52 and 44.
#include "cpu/low_bit_dot.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

// Packed, they should stay in L2 or L3 while the weight streams by.
constexpr int64_t kRowsAtOnce = 64;

template <typename Format, typename T>
void multiply(const LinearLowBit& args, int threads) {
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);
  const Groups<Format> groups(args.in_dim, args.weight.group_size);
  const int64_t size = packed_size<Format>(args.in_dim);
  const Buffer packed(round_up(std::min(args.rows, kRowsAtOnce), kMaxRows) * size);
  for (int64_t begin = 0; begin < args.rows; begin += kRowsAtOnce) {
    const int64_t end = std::min(args.rows, begin + kRowsAtOnce);
    for (int64_t first = begin; first < end; first += kMaxRows) {
      const auto row = [&](int r) { return x + (first + r) * args.stride_x_row; };
      const int rows = std::min<int64_t>(kMaxRows, end - first);
      pack_in_code_order<Format>(rows, args.in_dim, args.weight.perm, row,
                                 packed.data() + (first - begin) * size);
    }
#pragma omp parallel num_threads(team(threads, args.out_dim* args.in_dim))
    {
      const Buffer scratch(scales_floats(groups));
#pragma omp for schedule(static)
      for (int64_t line = 0; line < args.out_dim; line += kLanes) {
        const int64_t count = args.out_dim - line;
        const auto lines = low_bit_rows(args.weight, groups, args.in_dim, line, count,
                                        line + kLanes, scratch.data());
        for (int64_t first = begin; first < end; first += kMaxRows) {
          const int rows = std::min<int64_t>(kMaxRows, end - first);
          Floats dots[kMaxRows];
          dot<Format>(rows, packed.data() + (first - begin) * size, lines, args.in_dim, dots);
          for (int r = 0; r < rows; ++r) {
            store(out + (first + r) * args.out_dim + line, dots[r], count);
          }
        }
      }
    }
  }
}

// ---- Weights of many rows, in the order of their columns.

// The bytes of kLanes 4-bit codes, each in 64 bits.
inline auto load_pairs(const uint8_t* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepu8_epi64(-1, _mm_loadl_epi64((const __m128i*)from));
#elif defined(__AVX2__)
  int bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
#else
  using Pairs = uint64_t __attribute__((vector_size(kLanes * 4)));
  return Pairs{from[0], from[1]};
#endif
}

// kLanes codes, or the first `count` and zeros.
inline Floats codes_in_order(const uint8_t* row, int64_t column, int64_t count) {
  uint8_t bytes[kLanes / 2] = {};
  const bool whole = count >= kLanes;
  if (!whole) std::memcpy(bytes, row + column / 2, count / 2);
  const auto pairs = load_pairs(whole ? row + column / 2 : bytes);
  // The second code of a byte goes to the upper half of its 64 bits.
  const Ints codes = reinterpret_cast<Ints>(pairs | pairs << 28) & 15;
  return __builtin_convertvector(codes, Floats);
}
inline Floats codes_in_order(const Int8* row, int64_t column, int64_t count) {
  return load(row + column, count);
}
inline Floats codes_in_order(const Float8* row, int64_t column, int64_t count) {
  return load(row + column, count);
}

template <typename Stored, typename Zero, typename Scale, typename T>
void dequantise_rows(const Dequantise& args, int64_t middle, int threads) {
  const LowBit& weight = args.weight;
  const int64_t groups = args.in_dim / weight.group_size;
  const int64_t codes_a_byte = weight.codes == Dtype::kInt4 ? 2 : 1;
#pragma omp parallel for schedule(static) num_threads(team(threads, args.rows* args.in_dim))
  for (int64_t row = 0; row < args.rows; ++row) {
    const auto* codes =
        static_cast<const Stored*>(weight.qweight) + row * args.in_dim / codes_a_byte;
    T* out = static_cast<T*>(args.out) + row * args.in_dim;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = row * groups + group, first = group * weight.group_size;
      const auto* zeros = static_cast<const Zero*>(weight.zeros);
      const float zero = zeros == nullptr ? middle : zeros[at];
      const float scale = to_float(static_cast<const Scale*>(weight.scales)[at]);
      for_vectors(weight.group_size, [&](int64_t i, int64_t count) {
        store(out + first + i, (codes_in_order(codes, first + i, count) - zero) * scale, count);
      });
    }
  }
}

}  // namespace

void linear_low_bit(const LinearLowBit& args, int threads) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_format<T>(args.weight.codes, args.weight.zeros != nullptr,
                   [&](auto format) { multiply<decltype(format), T>(args, threads); });
  });
}

void dequantise(const Dequantise& args, int threads) {
  with_dtype(args.dtype, [&](auto out) {
    using T = decltype(out);
    with_dtype(args.weight.scale_dtype, [&](auto scale) {
      using Scale = decltype(scale);
      switch (args.weight.codes) {
        case Dtype::kInt4:
          return dequantise_rows<uint8_t, uint8_t, Scale, T>(args, 8, threads);
        case Dtype::kInt8:
          return dequantise_rows<Int8, int8_t, Scale, T>(args, 0, threads);
        default:
          return dequantise_rows<Float8, int8_t, Scale, T>(args, 0, threads);
      }
    });
  });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

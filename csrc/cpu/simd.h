// Vectors of floats as wide as the instruction set that this file is compiled for.
//
// Every kernel in csrc/cpu is compiled once for each instruction set (setup.py), into a namespace
// of its own, MISTRAL_KERNELS_PATH: no function may be shared by two of them. Kernels compute in
// float; `load` widens every storage type and `store` rounds to nearest even.
#pragma once

#include <utility>

#include "cpu/convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));  // as masks: all bits set, or none
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));

// All lanes x. Subtracting 0 changes no bit, and the compiler knows.
inline Floats broadcast(float x) { return x - Floats{}; }

inline Words words_of(Floats value) { return reinterpret_cast<Words>(value); }
inline Floats floats_of(Words bits) { return reinterpret_cast<Floats>(bits); }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where one is NaN

// ---- From and to memory: kLanes elements, or the first `count` with zeros behind them.

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// 16- and 8-bit elements, zero-extended. GCC 12 splits __builtin_convertvector to 512 bits in two,
// and warns of an uninitialised variable in the intrinsics that have no mask (here: all lanes).
inline Words load_words(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  return Words{from[0], from[1], from[2], from[3]};
#endif
}

inline Words load_words(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return Words{from[0], from[1], from[2], from[3]};
#endif
}

// 8-bit elements, sign-extended.
inline Ints load_ints(const int8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepi8_epi32(-1, _mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return Ints{from[0], from[1], from[2], from[3]};
#endif
}

inline Floats load(const BFloat16* from) { return floats_of(load_words(&from->bits) << 16); }

inline Floats load(const Float16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  return Floats{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
#endif
}

inline Floats load(const Int8* from) {
  return __builtin_convertvector(load_ints(&from->bits), Floats);
}

// A 256th of finite e4m3 codes. No float on the way is subnormal: an instruction that meets one
// takes a hundred cycles more, and with one subnormal code in 80 a product took 30 times as long.
inline Floats load_256th(const Float8* from) {
  const auto* codes = reinterpret_cast<const int8_t*>(from);
#if defined(__AVX2__)
  // In the fields of an fp16, whose exponents are biased by 8 more; sign-extended, the sign is
  // shifted to its place too.
  constexpr auto kFields = static_cast<int16_t>(0xbf80);
#endif
#if defined(__AVX512F__)
  const __m256i halves = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)codes));
  const __m256i fields = _mm256_and_si256(_mm256_slli_epi16(halves, 7), _mm256_set1_epi16(kFields));
  return (Floats)_mm512_maskz_cvtph_ps(-1, fields);
#elif defined(__AVX2__)
  const __m128i halves = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)codes));
  const __m128i fields = _mm_and_si128(_mm_slli_epi16(halves, 7), _mm_set1_epi16(kFields));
  return (Floats)_mm256_cvtph_ps(fields);
#else
  const Words bits = reinterpret_cast<Words>(load_ints(codes));
  const Words magnitude = (bits << 20) & 0x07f00000u;
  const Floats normal = floats_of(magnitude + (112u << 23));
  // Its fraction has no leading one, and the exponent of the smallest normal number.
  const Floats subnormal = floats_of(magnitude + (113u << 23)) - 0x1p-14f;
  const Floats value = magnitude < 0x00800000u ? subnormal : normal;
  return floats_of(words_of(value) | (bits & 0x80000000u));
#endif
}

inline Floats load(const Float8* from) {
  const Words bytes = load_words(&from->bits);
  const Words nan = (bytes & 0x7fu) == 0x7fu ? Words{} + 0x7fc00000u : Words{};
  return floats_of(words_of(load_256th(from) * 256.0f) | nan);
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

inline void store(BFloat16* to, Floats value) {
  const Words bits = words_of(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words halves = value == value ? rounded : Words{} + 0x7fc0u;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)halves));
#else
  for (int i = 0; i < kLanes; ++i) to[i].bits = static_cast<uint16_t>(halves[i]);
#endif
}

inline void store(Float16* to, Floats value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<Float16>(value[i]);
#endif
}

template <typename T>
inline Floats load(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* to, Floats value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  T padded[kLanes];
  store(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
}

// Calls body(first, count) for each vector of a row; only the last count may be below kLanes.
template <typename Body>
inline void for_vectors(int64_t size, Body&& body) {
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) body(first, int64_t{kLanes});
  if (first < size) body(first, size - first);
}

// ---- Lanes moved about.

template <int... kLane>
inline Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, Ints{kLane...});
#endif
}

template <int... kLane>
inline Floats evens(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return shuffle<2 * kLane...>(a, b);
}

template <int... kLane>
inline Floats odds(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return shuffle<2 * kLane + 1 ...>(a, b);
}

// Starting at lane kFirst of both: {a[kFirst], b[kFirst], a[kFirst + 1], b[kFirst + 1], ...}
template <int kFirst, int... kLane>
inline Floats interleave(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return shuffle<kFirst + kLane / 2 + kLane % 2 * kLanes...>(a, b);
}

using AllLanes = std::make_integer_sequence<int, kLanes>;

inline Floats evens(Floats a, Floats b) { return evens(a, b, AllLanes()); }  // {a0, .., b0, ..}
inline Floats odds(Floats a, Floats b) { return odds(a, b, AllLanes()); }    // {a1, .., b1, ..}

// The two vectors whose evens are a and whose odds are b.
inline Floats interleave_low(Floats a, Floats b) { return interleave<0>(a, b, AllLanes()); }
inline Floats interleave_high(Floats a, Floats b) {
  return interleave<kLanes / 2>(a, b, AllLanes());
}

// ---- Sums across lanes.

// {a0 + a1, a2 + a3, ..., b0 + b1, ...}
inline Floats add_neighbours(Floats a, Floats b) { return evens(a, b) + odds(a, b); }

// Lane i of the result is the sum of all lanes of rows[i].
inline Floats sum_each(Floats (&rows)[kLanes]) {
  for (int left = kLanes; left > 1; left /= 2) {
    for (int i = 0; i < left / 2; ++i) rows[i] = add_neighbours(rows[2 * i], rows[2 * i + 1]);
  }
  return rows[0];
}

// The sum of all lanes, added in the order of sum_each.
inline float sum(Floats value) {
  for (int left = kLanes; left > 1; left /= 2) value = add_neighbours(value, value);
  return value[0];
}

// The largest of all lanes, none of which is NaN.
inline float largest_of(Floats value) {
  for (int left = kLanes; left > 1; left /= 2) {
    value = larger(evens(value, value), odds(value, value));
  }
  return value[0];
}

// ---- Functions.

// 2^x for x in [-0.5, 0.5].
inline Floats exp2_fraction(Floats x) {
  // Fitted at Chebyshev's nodes: 5e-9 off before rounding.
  Floats power = broadcast(1.5461447e-4f);
  power = power * x + 1.3390867e-3f;
  power = power * x + 9.6180567e-3f;
  power = power * x + 5.5503571e-2f;
  power = power * x + 2.4022651e-1f;
  power = power * x + 6.9314719e-1f;
  power = power * x + 1.0f;
  return power;
}

// 2^x to about 1 ulp: 0 below -150, inf from 128 on, NaN of NaN.
inline Floats exp2(Floats x) {
  x = x < -252.0f ? broadcast(-252.0f) : x;  // far enough, and the exponents below stay in range
  x = x > 252.0f ? broadcast(252.0f) : x;
  const Floats shifter = broadcast(0x1.8p23f);  // adding it leaves the integer nearest to x
  const Floats shifted = x + shifter;
  const Floats part = x - (shifted - shifter);  // in [-0.5, 0.5]
  const Ints whole = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(shifter);
  const Floats power = exp2_fraction(part);
  const Ints half = whole >> 1;  // two factors reach denormal results and infinity
  return power * reinterpret_cast<Floats>((half + 127) << 23) *
         reinterpret_cast<Floats>((whole - half + 127) << 23);
}

constexpr float kLog2E = 1.44269504f;

// x / (1 + e^-x)
inline Floats silu(Floats x) { return x / (1.0f + exp2(-kLog2E * x)); }

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

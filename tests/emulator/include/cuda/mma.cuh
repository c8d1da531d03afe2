// Host twin of the tensor core instructions: the last lane to arrive computes for the whole warp.
// Register layouts are those of the shipped header, whose comment draws them. Products are summed
// in float in the order of k; the hardware's order is its own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

#include "emulator.h"

namespace mistral_kernels::cuda {

namespace twin {

struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
};

// Element `half` (0: lower, 1: upper) of a register.
template <typename T>
float element(uint32_t packed, int half) {
  const uint16_t bits = static_cast<uint16_t>(packed >> (16 * half));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  return static_cast<float>(value);
}

template <typename T>
void multiply(const emulator::Lane* lanes, unsigned) {
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane].input);
    const int g = lane / 4;
    for (int i = 0; i < 8; ++i) {
      const int column = lane % 4 * 2 + i % 2;
      a[g + i / 2 % 2 * 8][column + i / 4 * 8] = element<T>(own.a[i / 2], i % 2);
      if (i < 4) b[column + i / 2 * 8][g] = element<T>(own.b[i / 2], i % 2);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane].input);
    float* d = static_cast<float*>(lanes[lane].output);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = lane % 4 * 2 + i % 2;
      float sum = own.d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[i] = sum;
    }
  }
}

template <bool kTransposed>
void load_matrices(const emulator::Lane* lanes, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* registers = static_cast<uint32_t*>(lanes[lane].output);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t packed = 0;
      for (int half = 0; half < 2; ++half) {
        int row = lane / 4;
        int column = lane % 4 * 2 + half;
        if (kTransposed) std::swap(row, column);
        const auto* from = static_cast<const uint16_t*>(lanes[matrix * 8 + row].input);
        packed |= static_cast<uint32_t>(from[column]) << (16 * half);
      }
      registers[matrix] = packed;
    }
  }
}

}  // namespace twin

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::Fragments own;
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  std::memcpy(own.d, d, sizeof(d));
  emulator::collective(emulator::kAllLanes, &own, d, twin::multiply<T>);
}

inline void load_matrix_4(uint32_t (&r)[4], const void* shared) {
  emulator::require_aligned(shared, 16, "ldmatrix");
  emulator::collective(emulator::kAllLanes, shared, r, twin::load_matrices<false>);
}

inline void load_matrix_4_transposed(uint32_t (&r)[4], const void* shared) {
  emulator::require_aligned(shared, 16, "ldmatrix");
  emulator::collective(emulator::kAllLanes, shared, r, twin::load_matrices<true>);
}

}  // namespace mistral_kernels::cuda

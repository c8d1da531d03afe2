// Matrix products of one warp on tensor cores (mma.sync, sm_80), and the loads that feed them.
//
// With g = lane / 4 and t = lane % 4, and two 16-bit elements a register, lower index in the lower
// half, lane holds of d (16 x 8) = a (16 x 16) * b (16 x 8) + d:
//   a[0]: row g,     columns 2t, 2t+1      b[0]: rows 2t, 2t+1,   column g
//   a[1]: row g + 8, columns 2t, 2t+1      b[1]: rows 2t+8, 2t+9, column g
//   a[2]: row g,     columns 2t+8, 2t+9    d[0], d[1]: row g,     columns 2t, 2t+1
//   a[3]: row g + 8, columns 2t+8, 2t+9    d[2], d[3]: row g + 8, columns 2t, 2t+1
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mistral_kernels::cuda {

// d += a * b in float, the elements of a and b being T. All 32 lanes call it together.
template <typename T>
__device__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8i + j passes the address
// of row j of matrix i, on a 16-byte boundary; r[i] becomes row g, columns 2t and 2t+1 of matrix i.
__device__ inline void load_matrix_4(uint32_t (&r)[4], const void* shared) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The same of the transposed matrices: r[i] becomes rows 2t and 2t+1, column g of matrix i.
__device__ inline void load_matrix_4_transposed(uint32_t (&r)[4], const void* shared) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

}  // namespace mistral_kernels::cuda

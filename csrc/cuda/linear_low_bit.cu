// linear_low_bit on CUDA for up to 8 rows of x, bound by reading the weight: once, by blocks of 16
// rows of it. low_bit_rows.cuh says how, and what that costs. Not measured; at 4.8 TB/s (H200) a
// weight (14336, 4096) of 4 bits in groups of 128, 30 MB, would take 6.3 us, of 8 bits 12.2 us.
#include "cuda/convert.cuh"
#include "cuda/launch.cuh"
#include "cuda/low_bit_dispatch.cuh"
#include "cuda/low_bit_rows.cuh"
#include "cuda/row_sums.cuh"
#include "launchers.h"

// codegen: linear_low_bit_kernel is due mma
// codegen: linear_low_bit_kernel is due cp_async
// codegen: linear_low_bit_kernel is due load_16
// codegen: linear_low_bit_kernel moves 30.3e6 bytes, does 117e6 operations for int4 g128, 1 row
// codegen: linear_low_bit_kernel moves 30.3e6 bytes, does 940e6 operations for int4 g128, 8 rows
// codegen: linear_low_bit_kernel moves 58.7e6 bytes, does 117e6 operations for int8, 1 row

namespace mistral_kernels::cuda {
namespace {

static_assert(kThreads >= kTileTokens * kRows, "a thread adds up one output");

// Grid (kRows of the weight,). A block computes them for all rows of x; its warps share k.
template <typename T, typename Codes, int kUnits>
__global__ void __launch_bounds__(kThreads, 3)
    linear_low_bit_kernel(const T* __restrict__ x,  // (rows, in_dim)
                          LowBit weight,            // (out_dim, in_dim)
                          T* __restrict__ out,      // (rows, out_dim), contiguous
                          int rows, int in_dim, int out_dim, int64_t stride_x_row) {
  __shared__ uint4 ring[kWarps * kRingVectors];
  __shared__ float partial[kTileTokens * kWarps * kRows];
  const int group = threadIdx.x % 32 / 4;
  const int warp = threadIdx.x / 32;
  const int first_column = blockIdx.x * kRows;
  const int64_t columns[2] = {min(first_column + group, out_dim - 1),
                              min(first_column + group + 8, out_dim - 1)};
  const T* token = x + min(group, rows - 1) * stride_x_row;
  float sums[1][4] = {};
  LowBitRows<T, Codes, kUnits> product(weight, columns, token, weight.perm, in_dim, ring);
  product.multiply(warp, kWarps, sums[0]);
  put_partial(sums, [=](int row) { return row < rows ? row : -1; }, partial);
  __syncthreads();

  const int row = threadIdx.x / kRows;
  const int column = first_column + threadIdx.x % kRows;
  if (row >= rows || column >= out_dim) return;
  const float sum = add_partial<kWarps>(partial, row, 0, threadIdx.x % kRows);
  out[static_cast<int64_t>(row) * out_dim + column] = from_float<T>(sum);
}

}  // namespace

void linear_low_bit(const LinearLowBit& args, int device, void* stream) {
  if (args.rows == 0 || args.out_dim == 0) return;
  const DeviceGuard guard(device, "linear_low_bit");
  const bool one_group = steps_have_one_group(args.weight, args.in_dim);
  const auto run = [&](auto element, auto codes, auto units) {
    using T = decltype(element);
    const auto out_dim = static_cast<int>(args.out_dim);
    launch("linear_low_bit", linear_low_bit_kernel<T, decltype(codes), decltype(units)::value>,
           dim3((out_dim + kRows - 1) / kRows), dim3(kThreads), 0, stream,
           static_cast<const T*>(args.x), args.weight, static_cast<T*>(args.out),
           static_cast<int>(args.rows), static_cast<int>(args.in_dim), out_dim, args.stride_x_row);
  };
  with_low_bit("linear_low_bit", args.dtype, args.weight.codes, one_group, run);
}

}  // namespace mistral_kernels::cuda

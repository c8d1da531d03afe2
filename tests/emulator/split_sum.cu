// The worked example of README.md: sums of rows by one launch, with everything in it that is easy
// to get wrong. test_planted_faults.py breaks it in six ways.
#include <cstdint>
#include <exception>
#include <string>

#include "cuda/async_copy.cuh"
#include "cuda/dynamic_shared.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/reduce.cuh"

namespace mistral_kernels::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kTile = 4 * kThreads;  // numbers, one 16-byte copy a thread
constexpr int kStages = 3;

// Starts the copy of one tile of a row to its stage. Numbers from `count` on are not the row's.
__device__ void copy_tile(float* stages, const float* row, int tile, int last_tile, int count) {
  const int i = tile * kTile + 4 * threadIdx.x;
  if (tile < last_tile) {
    copy_async_16(stages + tile % kStages * kTile + 4 * threadIdx.x, i < count ? row + i : row,
                  i < count);
  }
  commit_copies();  // an empty group keeps the number of groups that are waited for
}

// Grid (splits, rows). A block adds the tiles of one split of a row; the last block of a row to
// come adds the splits in their order.
__global__ void __launch_bounds__(kThreads)
    split_sum_kernel(const float* __restrict__ numbers,  // (rows, stride), 16-byte boundaries
                     float* out,                         // (rows,)
                     float* partials,                    // (rows, splits)
                     uint32_t* counters,                 // (rows,), 0 before and after
                     int count, int stride, int tiles_per_split) {
  const int row = blockIdx.y;
  const int splits = gridDim.x;
  const float* from = numbers + int64_t{stride} * row;
  float* stages = dynamic_shared<float>();
  const int first_tile = blockIdx.x * tiles_per_split;
  const int last_tile = min(first_tile + tiles_per_split, (count + kTile - 1) / kTile);

  // Every thread adds what other threads have copied.
  float sum = 0.0f;
  for (int i = 0; i < kStages - 1; ++i) copy_tile(stages, from, first_tile + i, last_tile, count);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();  // all copies of this tile are there, and the stage filled next is read
    copy_tile(stages, from, tile + kStages - 1, last_tile, count);
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      const float value = stages[tile % kStages * kTile + i];
      sum += tile * kTile + i < count ? value : 0.0f;
    }
  }
  sum = block_sum<kThreads>(sum);

  // The partial sum is visible before the block counts as done.
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partials[row * splits + blockIdx.x] = sum;
    fence_device();
    last = increment_wrapping(counters + row, splits - 1) == static_cast<uint32_t>(splits - 1);
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float total = 0.0f;
  for (int split = 0; split < splits; ++split) {
    total += load_past_l1(partials + row * splits + split);
  }
  out[row] = total;
}

}  // namespace
}  // namespace mistral_kernels::cuda

// Returns what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* split_sum(
    const float* numbers, float* out, float* partials, uint32_t* counters, int rows, int count,
    int stride, int tiles_per_split) {
  using namespace mistral_kernels::cuda;
  static std::string error;
  const int per_split = kTile * tiles_per_split;
  const dim3 grid((count + per_split - 1) / per_split, rows);
  try {
    launch("split_sum", split_sum_kernel, grid, dim3(kThreads), kStages * kTile * sizeof(float),
           nullptr, numbers, out, partials, counters, count, stride, tiles_per_split);
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}

// Kernels that show that the emulator behaves like a GPU, and that it notices what is wrong.
#include <cstdint>
#include <exception>
#include <string>

#include "cuda/async_copy.cuh"
#include "cuda/convert.cuh"
#include "cuda/dynamic_shared.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"

namespace mistral_kernels::cuda {
namespace {

// out[block] = sum of in over the block's threads.
__global__ void block_sum_kernel(const float* in, float* out) {
  const float sum = block_sum<128>(in[blockIdx.x * 128 + threadIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Reverses `count` numbers in dynamic shared memory; reads `overrun` numbers further than that.
__global__ void reverse_kernel(int* numbers, int count, int overrun) {
  int* shared = dynamic_shared<int>();
  shared[threadIdx.x] = numbers[threadIdx.x];
  __syncthreads();
  numbers[threadIdx.x] = shared[count - 1 - threadIdx.x + overrun];
}

__global__ void static_overrun_kernel(int* out, int index) {
  __shared__ int shared[4];
  if (threadIdx.x < 4) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[index];
}

// What a block finds in fresh shared memory; it leaves zeros behind.
__global__ void fresh_kernel(int* out) {
  __shared__ int variable;
  int* dynamic = dynamic_shared<int>();
  out[2 * blockIdx.x] = variable;
  out[2 * blockIdx.x + 1] = dynamic[0];
  variable = dynamic[0] = 0;
}

// Each block keeps its number in shared memory while others run.
__global__ void residents_kernel(int* out, unsigned* alive) {
  __shared__ int own;
  own = blockIdx.x;
  const unsigned before = atomicAdd(alive, 1u);
  for (int i = 0; i < 20; ++i) fence_device();
  out[2 * blockIdx.x] = own;
  out[2 * blockIdx.x + 1] = static_cast<int>(before);
  atomicAdd(alive, ~0u);
}

// Appends the number of each thread in the order in which they come.
__global__ void arrivals_kernel(int* out, unsigned* count) {
  out[atomicAdd(count, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// Only one half of the warp reaches the shuffle.
__global__ void divergent_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 16);
}

__global__ void different_operations_kernel(int* out) {
  out[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(kAllLanes, 1, 1)
                                      : static_cast<int>(__ballot_sync(kAllLanes, 1));
}

// Lane i gets i + 1 from below, i + 10 from above, the votes of odd lanes, and whether any is > 30.
__global__ void warp_operations_kernel(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_up_sync(kAllLanes, lane, 1) + 100 * __shfl_down_sync(kAllLanes, lane, 1);
  out[32 + lane] = static_cast<int>(__ballot_sync(kAllLanes, lane % 2));
  out[64 + lane] = __any_sync(kAllLanes, lane > 30) + 2 * __all_sync(kAllLanes, lane > 30);
}

// Copies 64 bytes in four groups; reads after the wait for all but the newest `kPending`.
template <int kPending>
__global__ void async_kernel(const int* in, int* out) {
  int* shared = dynamic_shared<int>();
  for (int group = 0; group < 4; ++group) {
    copy_async_16(shared + 4 * group, in + 4 * group, group != 1);
    commit_copies();
  }
  wait_copies<kPending>();
  for (int i = 0; i < 16; ++i) out[i] = shared[i];
}

__global__ void misaligned_copy_kernel(const int* in) {
  copy_async_16(dynamic_shared<int>(), in + 1, true);
}

// d (16 x 8) = a (16 x 16) * b (16 x 8), all row-major, by one warp.
template <typename T>
__global__ void multiply_kernel(const float* a, const float* b, float* d) {
  T* shared = dynamic_shared<T>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared[i] = from_float<T>(a[i]);
  for (int i = lane; i < 128; i += 32) shared[256 + i] = from_float<T>(b[i]);
  __syncwarp();
  // Matrices of a: upper left, lower left, upper right, lower right; of b: upper, lower, twice.
  uint32_t a_registers[4];
  uint32_t b_registers[4];
  load_matrix_4(a_registers, shared + lane % 16 * 16 + lane / 16 * 8);
  load_matrix_4_transposed(b_registers, shared + 256 + lane % 16 * 8);
  float sums[4] = {};
  mma_16x8x16<T>(sums, a_registers, {b_registers[0], b_registers[1]});
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// The error that `run` threw, or null.
template <typename Run>
const char* error_of(Run run) {
  static std::string error;
  try {
    run();
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return nullptr;
}

template <typename... Params, typename... Args>
const char* run(void (*kernel)(Params...), int blocks, int threads, size_t shared_bytes,
                Args... args) {
  return error_of(
      [&] { launch("selftest", kernel, blocks, threads, shared_bytes, nullptr, args...); });
}

}  // namespace
}  // namespace mistral_kernels::cuda

using namespace mistral_kernels::cuda;

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT block_sum(const float* in, float* out, int blocks) {
  return run(block_sum_kernel, blocks, 128, 0, in, out);
}
EXPORT reverse(int* numbers, int count, int overrun) {
  return run(reverse_kernel, 1, count, count * sizeof(int), numbers, count, overrun);
}
EXPORT static_overrun(int* out, int index) {
  return run(static_overrun_kernel, 1, 32, 0, out, index);
}
EXPORT fresh(int* out, int blocks) { return run(fresh_kernel, blocks, 1, 4, out); }
EXPORT residents(int* out, unsigned* alive, int blocks) {
  return run(residents_kernel, blocks, 1, 0, out, alive);
}
EXPORT arrivals(int* out, unsigned* count, int blocks, int threads) {
  return run(arrivals_kernel, blocks, threads, 0, out, count);
}
EXPORT divergent(int* out) { return run(divergent_kernel, 1, 32, 0, out); }
EXPORT absent_lane(int* out) { return run(absent_lane_kernel, 1, 32, 0, out); }
EXPORT different_operations(int* out) { return run(different_operations_kernel, 1, 32, 0, out); }
EXPORT warp_operations(int* out) { return run(warp_operations_kernel, 1, 32, 0, out); }
EXPORT async_all(const int* in, int* out) { return run(async_kernel<0>, 1, 1, 64, in, out); }
EXPORT async_but_two(const int* in, int* out) { return run(async_kernel<2>, 1, 1, 64, in, out); }
EXPORT misaligned_copy(const int* in) { return run(misaligned_copy_kernel, 1, 1, 64, in); }
EXPORT multiply_bf16(const float* a, const float* b, float* d) {
  return run(multiply_kernel<__nv_bfloat16>, 1, 32, 768, a, b, d);
}
EXPORT multiply_fp16(const float* a, const float* b, float* d) {
  return run(multiply_kernel<__half>, 1, 32, 768, a, b, d);
}
EXPORT too_many_threads(int* out) { return run(divergent_kernel, 1, 1025, 0, out); }
EXPORT too_much_shared(int* out) { return run(divergent_kernel, 1, 32, 227 * 1024 + 1, out); }

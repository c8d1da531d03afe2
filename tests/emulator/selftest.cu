// Kernels that show that the emulator behaves like a GPU, and that it notices what is wrong.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/dynamic_shared.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace py = pybind11;

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

// Only one half of the warp reaches the shuffle.
__global__ void divergent_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 16);
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(selftest, m) {
  m.def("block_sum", [](std::uintptr_t in, std::uintptr_t out, int blocks) {
    launch("block_sum", block_sum_kernel, blocks, 128, 0, nullptr, pointer<const float>(in),
           pointer<float>(out));
  });
  m.def("reverse", [](std::uintptr_t numbers, int count, int overrun) {
    launch("reverse", reverse_kernel, 1, count, count * sizeof(int), nullptr, pointer<int>(numbers),
           count, overrun);
  });
  m.def("static_overrun", [](std::uintptr_t out, int index) {
    launch("static_overrun", static_overrun_kernel, 1, 32, 0, nullptr, pointer<int>(out), index);
  });
  m.def("divergent", [](std::uintptr_t out) {
    launch("divergent", divergent_kernel, 1, 32, 0, nullptr, pointer<int>(out));
  });
  m.def("absent_lane", [](std::uintptr_t out) {
    launch("absent_lane", absent_lane_kernel, 1, 32, 0, nullptr, pointer<int>(out));
  });
  m.def("too_many_threads", [](std::uintptr_t out) {
    launch("too_many_threads", divergent_kernel, 1, 1025, 0, nullptr, pointer<int>(out));
  });
}

}  // namespace mistral_kernels::cuda

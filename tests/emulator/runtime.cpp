// The part of the CUDA runtime's C interface that csrc/ uses: one device, and only those errors
// that a wrong call has on a GPU. Also what tests call in the built library.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <set>

namespace emulator::runtime {
namespace {

constexpr size_t kAnyKernelsBytes = 48 * 1024;
constexpr size_t kMaxBytes = 227 * 1024;  // of one block on sm_90

Order order = Order::kForward;
uint64_t seed = 0;

std::map<const void*, size_t>& dynamic_bytes() {
  static std::map<const void*, size_t> set_by_kernel;
  return set_by_kernel;
}

std::set<const void*>& launched() {
  static std::set<const void*> kernels;
  return kernels;
}

}  // namespace

size_t max_dynamic_bytes(const void* kernel) {
  const auto found = dynamic_bytes().find(kernel);
  return found == dynamic_bytes().end() ? kAnyKernelsBytes : found->second;
}

void record_launch(const void* kernel) { launched().insert(kernel); }

Turns new_turns() { return Turns(order, seed); }

}  // namespace emulator::runtime

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// The order of every launch from now on: a value of emulator::Order.
EMULATOR_EXPORT void emulator_set_order(int order, uint64_t seed) {
  emulator::runtime::order = static_cast<emulator::Order>(order);
  emulator::runtime::seed = seed;
}

// Writes the addresses of at most `count` of the kernels that ran; returns how many ran.
EMULATOR_EXPORT int emulator_launched_kernels(const void** addresses, int count) {
  const std::set<const void*>& kernels = emulator::runtime::launched();
  const int size = static_cast<int>(kernels.size());
  std::copy_n(kernels.begin(), std::min(count, size), addresses);
  return size;
}

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (value < 0 || static_cast<size_t>(value) > emulator::runtime::kMaxBytes) {
    return cudaErrorInvalidValue;
  }
  emulator::runtime::dynamic_bytes()[kernel] = value;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    default:
      return "unknown";
  }
}

const char* cudaGetErrorString(cudaError_t) { return "reported by the emulator"; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
}

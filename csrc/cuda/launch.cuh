// Host side of every kernel: device guard, error check, launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mistral_kernels::cuda {

// Throws std::runtime_error naming the op and the CUDA error.
inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// Makes `device` current and puts the caller's device back on scope exit.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op);
    if (previous_ == device) return;
    check(cudaSetDevice(device), op);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// kernel<<<grid, block, shared_bytes, stream>>>(args...) in plain C++, so that a host compiler can
// parse it too. Errors of the launch itself are thrown; those of the run surface at a later call.
template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            void* stream, Args... args) {
  constexpr size_t kGranted = 48 * 1024;  // more has to be asked for
  if (shared_bytes > kGranted) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          op);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, args...), op);
}

}  // namespace mistral_kernels::cuda

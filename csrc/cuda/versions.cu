// Versions of the driver and of the runtime that is linked in.
#include <cuda_runtime_api.h>

#include "launchers.h"

namespace mistral_kernels::cuda {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace mistral_kernels::cuda

// mistral_kernels._C: the launchers as Python functions on integers. The only pybind11 file.
//
// Pointers and streams arrive as integers (Tensor.data_ptr(), Stream.cuda_stream), strides in
// elements, dtypes as Dtype's values. Nothing is checked here: the ops in Python do that.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "launchers.h"

namespace py = pybind11;

namespace mistral_kernels {
namespace {

using Address = std::uintptr_t;  // of the first element; 0 where a tensor is absent

RmsNorm rms_norm_args(Address x, Address residual, Address weight, Address out, Address summed,
                      int64_t tokens, int64_t hidden, int64_t stride_x_token,
                      int64_t stride_residual_token, double eps, int dtype) {
  return {reinterpret_cast<const void*>(x),
          reinterpret_cast<const void*>(residual),
          reinterpret_cast<const void*>(weight),
          reinterpret_cast<void*>(out),
          reinterpret_cast<void*>(summed),
          tokens,
          hidden,
          stride_x_token,
          stride_residual_token,
          static_cast<float>(eps),
          static_cast<Dtype>(dtype)};
}

void rms_norm_cpu(Address x, Address residual, Address weight, Address out, Address summed,
                  int64_t tokens, int64_t hidden, int64_t stride_x_token,
                  int64_t stride_residual_token, double eps, int dtype) {
  cpu::rms_norm(rms_norm_args(x, residual, weight, out, summed, tokens, hidden, stride_x_token,
                              stride_residual_token, eps, dtype));
}

#ifdef MISTRAL_KERNELS_CUDA
void rms_norm_cuda(Address x, Address residual, Address weight, Address out, Address summed,
                   int64_t tokens, int64_t hidden, int64_t stride_x_token,
                   int64_t stride_residual_token, double eps, int dtype, int device,
                   Address stream) {
  cuda::rms_norm(rms_norm_args(x, residual, weight, out, summed, tokens, hidden, stride_x_token,
                               stride_residual_token, eps, dtype),
                 device, reinterpret_cast<void*>(stream));
}

py::tuple cuda_versions() {
  return py::make_tuple(cuda::driver_version(), cuda::runtime_version());
}
#endif

std::string compiler() {
#ifdef __clang__
  return __VERSION__;  // "Clang 17.0.6"
#else
  return "GCC " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
#ifdef MISTRAL_KERNELS_CUDA
  const int version = cuda::runtime_version();
  info["cuda"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["cuda_archs"] = MISTRAL_KERNELS_CUDA;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.doc() = "C++ and CUDA kernels of mistral_kernels on raw pointers; import torch first.";
  m.def("build_info", &build_info, "What this extension was built with; None where not built.");
  m.def("rms_norm_cpu", &rms_norm_cpu, no_gil);
#ifdef MISTRAL_KERNELS_CUDA
  m.def("cuda_versions", &cuda_versions, "(driver, runtime), 13000 for 13.0; driver 0 if absent.");
  m.def("rms_norm_cuda", &rms_norm_cuda, no_gil);
#endif
}

}  // namespace mistral_kernels

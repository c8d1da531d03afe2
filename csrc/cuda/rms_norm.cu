// rms_norm and add_rms_norm on CUDA: one block a token.
//
// A token costs 2 * hidden * itemsize bytes of DRAM traffic (x and out; weight stays in L2, and the
// second pass over the row hits L1), 4 * hidden * itemsize with a residual (residual and summed on
// top), and 4 * hidden operations (5 with a residual): bound by memory at every size. 4096 tokens
// of hidden 4096 in bf16 are 67 MB, 134 MB with a residual. Its time is not measured.
#include "cuda/convert.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "launchers.h"

namespace mistral_kernels::cuda {
namespace {

constexpr int kThreads = 256;  // not measured; hidden 4096 in bf16 is two vectors a thread
// Blocks that an SM must hold; of float, 8 of them would spill on sm_100.
template <typename T>
constexpr int kBlocks = sizeof(T) == 4 ? 6 : 8;

// Grid (tokens). A block owns one row; a thread owns every kThreads-th vector of it.
// codegen: rms_norm_kernel<*, true> is due load_16
// codegen: rms_norm_kernel<*, true> is due store_16
// codegen: rms_norm_kernel moves 67.1e6 bytes, does 67.1e6 operations for 4096 tokens of 4096
// codegen: rms_norm_kernel moves 134e6 bytes, does 84e6 operations for 4096 of 4096, residual
template <typename T, bool kHasResidual, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    rms_norm_kernel(const T* __restrict__ x,         // (tokens, hidden)
                    const T* __restrict__ residual,  // (tokens, hidden) or null
                    const T* __restrict__ weight,    // (hidden,)
                    T* __restrict__ out,             // (tokens, hidden), contiguous
                    T* summed,                       // (tokens, hidden), contiguous, or null
                    int64_t hidden, int64_t stride_x_token, int64_t stride_residual_token,
                    float eps) {
  constexpr int kWidth = Vector<T>::kWidth;
  const int64_t token = blockIdx.x;
  const T* row = x + token * stride_x_token;

  // Sum of squares, of the rounded sum where there is a residual.
  float squares = 0.0f;
  for (int64_t i = threadIdx.x * kWidth; i < hidden; i += kThreads * kWidth) {
    Vector<T> values = load_vector<kWhole>(row + i, hidden - i);
    if constexpr (kHasResidual) {
      const T* residual_row = residual + token * stride_residual_token;
      const Vector<T> addends = load_vector<kWhole>(residual_row + i, hidden - i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        values.values[j] = from_float<T>(to_float(values.values[j]) + to_float(addends.values[j]));
      }
      store_vector<kWhole>(summed + token * hidden + i, values, hidden - i);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      squares += to_float(values.values[j]) * to_float(values.values[j]);
    }
  }
  const float scale = rsqrtf(block_sum<kThreads>(squares) / static_cast<float>(hidden) + eps);

  // Each thread reads back only what it wrote itself, so `summed` needs no fence.
  if constexpr (kHasResidual) row = summed + token * hidden;
  for (int64_t i = threadIdx.x * kWidth; i < hidden; i += kThreads * kWidth) {
    Vector<T> values = load_vector<kWhole>(row + i, hidden - i);
    const Vector<T> weights = load_vector<kWhole>(weight + i, hidden - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      values.values[j] =
          from_float<T>(to_float(values.values[j]) * scale * to_float(weights.values[j]));
    }
    store_vector<kWhole>(out + token * hidden + i, values, hidden - i);
  }
}

template <typename T>
void launch_rms_norm(const RmsNorm& args, void* stream) {
  const bool add = args.residual != nullptr;
  bool whole = rows_are_vectors<T>(args.x, args.hidden, args.stride_x_token) &&
               rows_are_vectors<T>(args.weight, args.hidden, 0) &&
               rows_are_vectors<T>(args.out, args.hidden, args.hidden);
  if (add) {
    whole = whole && rows_are_vectors<T>(args.residual, args.hidden, args.stride_residual_token) &&
            rows_are_vectors<T>(args.summed, args.hidden, args.hidden);
  }
  const auto kernel =
      add ? (whole ? rms_norm_kernel<T, true, true> : rms_norm_kernel<T, true, false>)
          : (whole ? rms_norm_kernel<T, false, true> : rms_norm_kernel<T, false, false>);
  launch("rms_norm", kernel, dim3(static_cast<unsigned>(args.tokens)), dim3(kThreads), 0, stream,
         static_cast<const T*>(args.x), static_cast<const T*>(args.residual),
         static_cast<const T*>(args.weight), static_cast<T*>(args.out),
         static_cast<T*>(args.summed), args.hidden, args.stride_x_token, args.stride_residual_token,
         args.eps);
}

}  // namespace

void rms_norm(const RmsNorm& args, int device, void* stream) {
  if (args.tokens == 0) return;
  const DeviceGuard guard(device, "rms_norm");
  with_dtype("rms_norm", args.dtype,
             [&](auto element) { launch_rms_norm<decltype(element)>(args, stream); });
}

}  // namespace mistral_kernels::cuda

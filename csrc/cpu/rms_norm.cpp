// rms_norm and add_rms_norm on the CPU.
//
// A token costs 2 * hidden * itemsize bytes of memory traffic (x and out; weight and the second
// pass over the row hit the cache), 4 * hidden * itemsize with a residual (residual and summed on
// top), and 4 * hidden operations (5 with a residual).
#include <cmath>

#include "cpu/convert.h"
#include "launchers.h"

namespace mistral_kernels::cpu {
namespace {

// Returns the sum of squares of the row, and writes round(x + residual) when there is a residual.
template <typename T>
float sum_of_squares(const T* x, const T* residual, T* summed, int64_t hidden) {
  float sum = 0;
  if (residual == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < hidden; ++i) {
      const float value = to_float(x[i]);
      sum += value * value;
    }
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < hidden; ++i) {
    summed[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
    const float value = to_float(summed[i]);
    sum += value * value;
  }
  return sum;
}

template <typename T>
void normalize_rows(const RmsNorm& args) {
  const T* weight = static_cast<const T*>(args.weight);
  // Rows are independent and never split: the bits do not depend on the number of threads.
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < args.tokens; ++token) {
    const T* row = static_cast<const T*>(args.x) + token * args.stride_x_token;
    T* out = static_cast<T*>(args.out) + token * args.hidden;
    float squares;
    if (args.residual == nullptr) {
      squares = sum_of_squares<T>(row, nullptr, nullptr, args.hidden);
    } else {
      const T* residual = static_cast<const T*>(args.residual) + token * args.stride_residual_token;
      T* summed = static_cast<T*>(args.summed) + token * args.hidden;
      squares = sum_of_squares<T>(row, residual, summed, args.hidden);
      row = summed;
    }
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(args.hidden) + args.eps);
#pragma omp simd
    for (int64_t i = 0; i < args.hidden; ++i) {
      out[i] = from_float<T>(to_float(row[i]) * scale * to_float(weight[i]));
    }
  }
}

}  // namespace

void rms_norm(const RmsNorm& args) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return normalize_rows<float>(args);
    case Dtype::kBFloat16:
      return normalize_rows<BFloat16>(args);
    case Dtype::kFloat16:
      return normalize_rows<Float16>(args);
  }
}

}  // namespace mistral_kernels::cpu

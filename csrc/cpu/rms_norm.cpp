// rms_norm and add_rms_norm on the CPU.
//
// A token costs 2 * hidden * itemsize bytes of memory traffic (x and out; weight and the second
// pass over the row hit the cache), 4 * hidden * itemsize with a residual (residual and summed on
// top), and 4 * hidden operations (5 with a residual).
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/simd.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

// Returns the sum of squares of the row, and writes round(x + residual) when there is a residual.
template <typename T>
float sum_of_squares(const T* x, const T* residual, T* summed, int64_t hidden) {
  Floats squares = {};
  for_vectors(hidden, [&](int64_t i, int64_t count) {
    Floats value = load(x + i, count);
    if (residual != nullptr) {
      store(summed + i, value + load(residual + i, count), count);
      value = load(summed + i, count);
    }
    squares += value * value;
  });
  return sum(squares);
}

template <typename T>
void normalize_rows(const RmsNorm& args, int threads) {
  const T* weight = static_cast<const T*>(args.weight);
  // Rows are independent and never split: the bits do not depend on the number of threads.
#pragma omp parallel for schedule(static) num_threads(team(threads, args.tokens* args.hidden))
  for (int64_t token = 0; token < args.tokens; ++token) {
    const T* row = static_cast<const T*>(args.x) + token * args.stride_x_token;
    T* out = static_cast<T*>(args.out) + token * args.hidden;
    const T* residual = nullptr;
    T* summed = nullptr;
    if (args.residual != nullptr) {
      residual = static_cast<const T*>(args.residual) + token * args.stride_residual_token;
      summed = static_cast<T*>(args.summed) + token * args.hidden;
    }
    const float squares = sum_of_squares(row, residual, summed, args.hidden);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(args.hidden) + args.eps);
    if (summed != nullptr) row = summed;
    for_vectors(args.hidden, [&](int64_t i, int64_t count) {
      store(out + i, load(row + i, count) * scale * load(weight + i, count), count);
    });
  }
}

}  // namespace

void rms_norm(const RmsNorm& args, int threads) {
  with_dtype(args.dtype, [&](auto element) { normalize_rows<decltype(element)>(args, threads); });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// linear on the CPU, for few rows or for rows whose bits must not depend on their number.
//
// The weight is read from memory once for each kRowsAtOnce rows: out * in * itemsize bytes, and
// 2 * rows * out * in operations. At 31 GB/s and 2 * 100 GFLOP/s memory is the limit up to 6 rows
// of bf16 and 12 rows of fp32.
#include "cpu/dispatch.h"
#include "cpu/dot.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

// Packed, they should stay in L2 or L3 while the weight streams by.
constexpr int64_t kRowsAtOnce = 64;

template <typename T>
void multiply(const Linear& args, int threads) {
  using Product = Fastest<T>;
  const T* x = static_cast<const T*>(args.x);
  const T* weight = static_cast<const T*>(args.weight);
  T* out = static_cast<T*>(args.out);
  const int64_t size = packed_size<Product>(args.in_dim);
  const Buffer packed(round_up(std::min(args.rows, kRowsAtOnce), kMaxRows) * size);
  for (int64_t begin = 0; begin < args.rows; begin += kRowsAtOnce) {
    const int64_t end = std::min(args.rows, begin + kRowsAtOnce);
    for (int64_t first = begin; first < end; first += kMaxRows) {
      const auto row = [&](int r) { return x + (first + r) * args.stride_x_row; };
      const int rows = std::min<int64_t>(kMaxRows, end - first);
      pack<Product>(rows, args.in_dim, row, packed.data() + (first - begin) * size);
    }
    const int team_size = team(threads, args.out_dim * args.in_dim);
#pragma omp parallel for schedule(static) num_threads(team_size)
    for (int64_t line = 0; line < args.out_dim; line += kLanes) {
      const int64_t count = args.out_dim - line;
      const T* data = weight + line * args.stride_weight_row;
      const WeightRows<T> lines = {data, args.stride_weight_row, count,
                                   data + kLanes * args.stride_weight_row};
      for (int64_t first = begin; first < end; first += kMaxRows) {
        const int rows = std::min<int64_t>(kMaxRows, end - first);
        Floats dots[kMaxRows];
        dot<Product>(rows, packed.data() + (first - begin) * size, lines, args.in_dim, dots);
        for (int r = 0; r < rows; ++r) {
          store(out + (first + r) * args.out_dim + line, dots[r], count);
        }
      }
    }
  }
}

}  // namespace

void linear(const Linear& args, int threads) {
  with_dtype(args.dtype, [&](auto element) { multiply<decltype(element)>(args, threads); });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

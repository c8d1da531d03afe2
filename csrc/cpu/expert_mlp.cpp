// expert_mlp on the CPU for few tokens, or for tokens whose bits must not depend on their number.
//
// The weights of each used expert are read from memory once for each kMaxPairs (token, slot) pairs:
// 3 * hidden * ffn_dim * itemsize bytes an expert, and 6 * hidden * ffn_dim operations a pair.
// What lies between the two projections stays in fp32.
#include "cpu/expert_loop.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

template <typename T>
struct PlainExperts {
  using Up = Fastest<T>;
  using Down = Widened<T>;
  static constexpr bool kRepacks = false;
  const ExpertMlp& args;

  int64_t x_floats() const { return packed_size<Up>(args.hidden); }
  int64_t inner_floats() const { return packed_size<Down>(args.ffn_dim); }
  int64_t scratch_floats() const { return 0; }

  template <typename Row>
  void pack(const Group& group, Row&& row, float* to) const {
    cpu::MISTRAL_KERNELS_PATH::pack<Up>(group.rows, args.hidden, row, to);
  }
  void up(const Group& group, const float* x, int64_t row, int64_t count, float*,
          Floats* out) const {
    const int64_t at = group.expert * args.stride_w13_expert + row * args.stride_w13_row;
    dot<Up>(group.rows, x, rows_at(args.w13, at, args.stride_w13_row, count), args.hidden, out);
  }
  void down(const Group& group, const float* inner, int64_t row, int64_t count, float*,
            Floats* out) const {
    const int64_t at = group.expert * args.stride_w2_expert + row * args.stride_w2_row;
    dot<Down>(group.rows, inner, rows_at(args.w2, at, args.stride_w2_row, count), args.ffn_dim,
              out);
  }
  static WeightRows<T> rows_at(const void* weight, int64_t at, int64_t stride, int64_t count) {
    return {static_cast<const T*>(weight) + at, stride, count};
  }
};

}  // namespace

void expert_mlp(const ExpertMlp& args, int threads) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    run_experts<T>(PlainExperts<T>{args}, args, threads);
  });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

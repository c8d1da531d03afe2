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
  void up(int rows, const float* x, const Lines& lines, float*, Floats* out) const {
    dot<Up>(rows, x, weight_rows(args.w13, lines, args.stride_w13_expert, args.stride_w13_row),
            args.hidden, out);
  }
  void down(int rows, const float* inner, const Lines& lines, float*, Floats* out) const {
    dot<Down>(rows, inner, weight_rows(args.w2, lines, args.stride_w2_expert, args.stride_w2_row),
              args.ffn_dim, out);
  }
  static WeightRows<T> weight_rows(const void* weight, const Lines& lines, int64_t stride_expert,
                                   int64_t stride_row) {
    const auto at = [&](const Line& line) {
      return static_cast<const T*>(weight) + line.expert * stride_expert + line.row * stride_row;
    };
    return {at(lines.at), stride_row, lines.count, at(lines.next)};
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

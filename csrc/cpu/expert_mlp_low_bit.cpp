// expert_mlp_low_bit on the CPU for few tokens.
//
// As expert_mlp.cpp does, on codes: those of a used expert are read once for each kMaxPairs pairs,
// 3 * hidden * ffn_dim / 2 bytes of 4 bits. linear_low_bit.cpp says what a core makes of them.
// What lies between the two projections is packed when all of it is there, because the codes of w2
// have an order of their own: in fp32, or where bf16 multiplies the codes in that, as a model that
// works op by op would have it.
#include "cpu/expert_loop.h"
#include "cpu/low_bit_dot.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

template <typename Format>
class LowBitExperts {
 public:
  static constexpr bool kRepacks = true;

  explicit LowBitExperts(const ExpertMlpLowBit& args)
      : args_(args),
        up_groups_(args.hidden, args.w13.group_size),
        down_groups_(args.ffn_dim, args.w2.group_size) {}

  int64_t x_floats() const { return packed_size<Format>(args_.hidden); }
  int64_t inner_floats() const { return packed_size<Format>(args_.ffn_dim); }
  int64_t scratch_floats() const {
    return std::max(scales_floats(up_groups_), scales_floats(down_groups_));
  }

  template <typename Row>
  void pack(const Group& group, Row&& row, float* to) const {
    pack_in_code_order<Format>(group.rows, args_.hidden, perm(args_.w13, group, args_.hidden), row,
                               to);
  }
  void pack_inner(const Group& group, const float* from, float* to) const {
    const auto row = [&](int r) { return from + r * args_.ffn_dim; };
    pack_in_code_order<Format>(group.rows, args_.ffn_dim, perm(args_.w2, group, args_.ffn_dim), row,
                               to);
  }
  void up(int rows, const float* x, const Lines& lines, float* scratch, Floats* out) const {
    const int64_t size = 2 * args_.ffn_dim;
    dot<Format>(rows, x,
                low_bit_rows(args_.w13, up_groups_, args_.hidden, lines.at.of(size), lines.count,
                             lines.next.of(size), scratch),
                args_.hidden, out);
  }
  void down(int rows, const float* inner, const Lines& lines, float* scratch, Floats* out) const {
    const int64_t size = args_.hidden;
    dot<Format>(rows, inner,
                low_bit_rows(args_.w2, down_groups_, args_.ffn_dim, lines.at.of(size), lines.count,
                             lines.next.of(size), scratch),
                args_.ffn_dim, out);
  }

 private:
  static const int32_t* perm(const LowBit& weight, const Group& group, int64_t in) {
    return weight.perm == nullptr ? nullptr : weight.perm + group.expert * in;
  }

  const ExpertMlpLowBit& args_;
  const Groups<Format> up_groups_;
  const Groups<Format> down_groups_;
};

}  // namespace

void expert_mlp_low_bit(const ExpertMlpLowBit& args, int threads) {
  const bool zeros = args.w13.zeros != nullptr || args.w2.zeros != nullptr;
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_format<T>(args.w13.codes, zeros, [&](auto format) {
      run_experts<T>(LowBitExperts<decltype(format)>(args), args, threads);
    });
  });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

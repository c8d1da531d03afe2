// expert_mlp on the CPU for few tokens, or for tokens whose bits must not depend on their number.
//
// The weights of each used expert are read from memory once for each kMaxPairs (token, slot) pairs:
// 3 * hidden * ffn_dim * itemsize bytes an expert, and 6 * hidden * ffn_dim operations a pair.
// What lies between the two projections stays in fp32.
#include "cpu/dispatch.h"
#include "cpu/dot.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

constexpr int kMaxPairs = 256;

// Pairs that chose the same expert and are worked together.
struct Group {
  int expert;
  int rows;
  int first_row;  // of the packed rows of all groups
  int pairs[kMaxRows];
};

// The pairs of some tokens by expert; pair = token * top_k + slot.
struct Plan {
  int groups = 0;
  int rows = 0;  // packed rows of all groups
  int experts = 0;
  int begin[kMaxPairs + 1];  // the groups of the i-th used expert are begin[i] .. begin[i + 1] - 1
  Group group[kMaxPairs];
};

// The expert of a pair, -1 where the slot is skipped.
int expert_of(const ExpertMlp& args, int64_t first_token, int64_t pair) {
  const int64_t token = first_token + pair / args.top_k;
  const int32_t id = args.expert_ids[token * args.stride_ids_token + pair % args.top_k];
  return id >= 0 && id < args.experts ? id : -1;
}

void make_plan(const ExpertMlp& args, int64_t first_token, int pairs, Plan& plan) {
  int experts[kMaxPairs];
  for (int pair = 0; pair < pairs; ++pair) experts[pair] = expert_of(args, first_token, pair);
  for (int pair = 0; pair < pairs; ++pair) {
    const int expert = experts[pair];
    if (expert < 0) continue;  // skipped, or taken along below
    plan.begin[plan.experts++] = plan.groups;
    Group* group = nullptr;
    for (int other = pair; other < pairs; ++other) {
      if (experts[other] != expert) continue;
      experts[other] = -1;
      if (group == nullptr || group->rows == kMaxRows) {
        group = &plan.group[plan.groups++];
        group->expert = expert;
        group->rows = 0;
      }
      group->pairs[group->rows++] = other;
    }
  }
  plan.begin[plan.experts] = plan.groups;
  for (int i = 0; i < plan.groups; ++i) {
    plan.group[i].first_row = plan.rows;
    plan.rows += padded_rows(plan.group[i].rows);
  }
}

// Rows first .. of a weight that has `rows`.
template <typename T>
WeightRows<T> rows_of(const T* weight, int64_t stride, int64_t first, int64_t rows) {
  return {weight + first * stride, stride, rows - first};
}

// inner = silu(gate) * up for kLanes of ffn_dim from `first` on, packed as the x of w2.
template <typename T>
void project_up(const ExpertMlp& args, const Group& group, const float* x, int64_t first,
                float* inner) {
  using Product = Fastest<T>;
  const T* w13 = static_cast<const T*>(args.w13) + group.expert * args.stride_w13_expert;
  const T* up_rows = w13 + args.ffn_dim * args.stride_w13_row;
  Floats gate[kMaxRows], up[kMaxRows];
  const auto project = [&](const T* weight, Floats* out) {
    dot<Product>(group.rows, x, rows_of(weight, args.stride_w13_row, first, args.ffn_dim),
                 args.hidden, out);
  };
  project(w13, gate);
  project(up_rows, up);
  const int padded = padded_rows(group.rows);
  for (int r = 0; r < padded; ++r) {
    float* to = inner + first * padded + r * kLanes;
    store(to, Floats{});  // of the last vector the rest is multiplied with 0
    store(to, silu(gate[r]) * up[r], args.ffn_dim - first);
  }
}

// out = the weighted sum of w2 inner over slots, for kLanes of hidden from `first` on.
template <typename T>
void project_down(const ExpertMlp& args, const Plan& plan, const float* inner, int64_t inner_size,
                  int64_t first_token, int64_t tokens, int64_t first) {
  using Product = Widened<T>;
  Floats down[kMaxPairs];
  for (int i = 0; i < plan.groups; ++i) {
    const Group& group = plan.group[i];
    const T* w2 = static_cast<const T*>(args.w2) + group.expert * args.stride_w2_expert;
    Floats dots[kMaxRows];
    dot<Product>(group.rows, inner + group.first_row * inner_size,
                 rows_of(w2, args.stride_w2_row, first, args.hidden), args.ffn_dim, dots);
    for (int r = 0; r < group.rows; ++r) down[group.pairs[r]] = dots[r];
  }
  for (int64_t token = first_token; token < first_token + tokens; ++token) {
    Floats total = {};
    for (int64_t slot = 0; slot < args.top_k; ++slot) {
      const int64_t pair = (token - first_token) * args.top_k + slot;
      if (expert_of(args, first_token, pair) < 0) continue;
      total += down[pair] * args.weights[token * args.stride_weights_token + slot];
    }
    store(static_cast<T*>(args.out) + token * args.hidden + first, total, args.hidden - first);
  }
}

template <typename T>
void run_tokens(const ExpertMlp& args, int64_t first_token, int64_t tokens, int threads) {
  using Product = Fastest<T>;
  Plan plan;
  make_plan(args, first_token, tokens * args.top_k, plan);
  const int64_t x_size = packed_size<Product>(args.hidden);
  const int64_t inner_size = packed_size<Widened<T>>(args.ffn_dim);
  const Buffer x(plan.rows * x_size);
  const Buffer inner(plan.rows * inner_size);
  for (int i = 0; i < plan.groups; ++i) {
    const Group& group = plan.group[i];
    const auto row = [&](int r) {
      const int64_t token = first_token + group.pairs[r] / args.top_k;
      return static_cast<const T*>(args.x) + token * args.stride_x_token;
    };
    pack<Product>(group.rows, args.hidden, row, x.data() + group.first_row * x_size);
  }
  const int64_t blocks = (args.ffn_dim + kLanes - 1) / kLanes;
  const int team_size = team(threads, 3 * plan.experts * args.hidden * args.ffn_dim);
#pragma omp parallel num_threads(team_size)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < plan.experts * blocks; ++item) {
      const int64_t expert = item / blocks;
      for (int i = plan.begin[expert]; i < plan.begin[expert + 1]; ++i) {
        const int row = plan.group[i].first_row;
        project_up<T>(args, plan.group[i], x.data() + row * x_size, item % blocks * kLanes,
                      inner.data() + row * inner_size);
      }
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < args.hidden; first += kLanes) {
      project_down<T>(args, plan, inner.data(), inner_size, first_token, tokens, first);
    }
  }
}

}  // namespace

void expert_mlp(const ExpertMlp& args, int threads) {
  const int64_t tokens_at_once = kMaxPairs / args.top_k;
  for (int64_t first = 0; first < args.tokens; first += tokens_at_once) {
    const int64_t tokens = std::min(tokens_at_once, args.tokens - first);
    with_dtype(args.dtype,
               [&](auto element) { run_tokens<decltype(element)>(args, first, tokens, threads); });
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

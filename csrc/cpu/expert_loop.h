// The loops of expert_mlp on the CPU, whatever its weights are made of.
//
// `Experts` says how the two projections of a group of pairs read their weights:
//
//     Experts(args)                           kRepacks: `inner` is packed once a group is complete
//     x_floats(), inner_floats()              of a packed row of x, and of silu(gate) * up
//     scratch_floats()                        of memory that each thread hands to up() and down()
//     pack(group, row, to)                    packs the rows of x, row(0) and on
//     up(rows, x, lines, scratch, out)        lines of the 2 * ffn_dim rows of w13, times x
//     pack_inner(group, from, to)             packs rows of ffn_dim floats, with kRepacks
//     down(rows, inner, lines, scratch, out)  lines of the hidden rows of w2, times inner
//
// Without kRepacks what lies between the projections is packed as Widened<float> would be.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/dot.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {

constexpr int kMaxPairs = 256;

// Pairs that chose the same expert and are worked together.
struct Group {
  int expert;
  int rows;
  int first_row;  // of the packed rows of all groups
  int pairs[kMaxRows];
};

// A row of an expert's weight.
struct Line {
  int64_t expert;
  int64_t row;

  int64_t of(int64_t rows) const { return expert * rows + row; }  // counted over all experts
};

// Rows of a weight, `count` from `at` on, of which kLanes are worked at most, and those that are
// read afterwards.
struct Lines {
  Line at;
  int64_t count;
  Line next;
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
template <typename Args>
inline int expert_of(const Args& args, int64_t first_token, int64_t pair) {
  const int64_t token = first_token + pair / args.top_k;
  const int32_t id = args.expert_ids[token * args.stride_ids_token + pair % args.top_k];
  return id >= 0 && id < args.experts ? id : -1;
}

template <typename Args>
void make_plan(const Args& args, int64_t first_token, int pairs, Plan& plan) {
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

// inner = silu(gate) * up for kLanes of ffn_dim from `first` on.
template <typename Experts, typename Args>
void project_up(const Experts& experts, const Args& args, const Group& group, const float* x,
                int64_t first, float* scratch, float* inner) {
  Floats gate[kMaxRows], up[kMaxRows];
  const int64_t count = args.ffn_dim - first;
  const Line of_gate = {group.expert, first}, of_up = {group.expert, args.ffn_dim + first};
  experts.up(group.rows, x, {of_gate, count, of_up}, scratch, gate);
  experts.up(group.rows, x, {of_up, count, {group.expert, first + kLanes}}, scratch, up);
  const int padded = padded_rows(group.rows);
  for (int r = 0; r < padded; ++r) {
    const Floats value = silu(gate[r]) * up[r];
    if constexpr (Experts::kRepacks) {
      store(inner + r * args.ffn_dim + first, value, count);
    } else {
      float* to = inner + first * padded + r * kLanes;
      store(to, Floats{});  // of the last vector the rest is multiplied with 0
      store(to, value, count);
    }
  }
}

// out = the weighted sum of w2 inner over slots, for kLanes of hidden from `first` on.
template <typename T, typename Experts, typename Args>
void project_down(const Experts& experts, const Args& args, const Plan& plan, const float* inner,
                  int64_t first_token, int64_t tokens, int64_t first, float* scratch) {
  Floats down[kMaxPairs];
  for (int i = 0; i < plan.groups; ++i) {
    const Group& group = plan.group[i];
    const Line next = i + 1 < plan.groups ? Line{plan.group[i + 1].expert, first}
                                          : Line{plan.group[0].expert, first + kLanes};
    Floats dots[kMaxRows];
    experts.down(group.rows, inner + group.first_row * experts.inner_floats(),
                 {{group.expert, first}, args.hidden - first, next}, scratch, dots);
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

template <typename T, typename Experts, typename Args>
void run_tokens(const Experts& experts, const Args& args, int64_t first_token, int64_t tokens,
                int threads) {
  Plan plan;
  make_plan(args, first_token, tokens * args.top_k, plan);
  const int64_t x_size = experts.x_floats(), inner_size = experts.inner_floats();
  const Buffer x(plan.rows * x_size);
  const Buffer inner(plan.rows * inner_size);
  const Buffer unpacked(Experts::kRepacks ? plan.rows * args.ffn_dim : 0);
  for (int i = 0; i < plan.groups; ++i) {
    const Group& group = plan.group[i];
    const auto row = [&](int r) {
      const int64_t token = first_token + group.pairs[r] / args.top_k;
      return static_cast<const T*>(args.x) + token * args.stride_x_token;
    };
    experts.pack(group, row, x.data() + group.first_row * x_size);
  }
  const int64_t blocks = (args.ffn_dim + kLanes - 1) / kLanes;
  const int team_size = team(threads, 3 * plan.experts * args.hidden * args.ffn_dim);
#pragma omp parallel num_threads(team_size)
  {
    const Buffer scratch(experts.scratch_floats());
#pragma omp for schedule(static)
    for (int64_t item = 0; item < plan.experts * blocks; ++item) {
      const int64_t expert = item / blocks;
      for (int i = plan.begin[expert]; i < plan.begin[expert + 1]; ++i) {
        const int row = plan.group[i].first_row;
        project_up(experts, args, plan.group[i], x.data() + row * x_size, item % blocks * kLanes,
                   scratch.data(),
                   Experts::kRepacks ? unpacked.data() + row * args.ffn_dim
                                     : inner.data() + row * inner_size);
      }
    }
    if constexpr (Experts::kRepacks) {
#pragma omp for schedule(static)
      for (int i = 0; i < plan.groups; ++i) {
        const int row = plan.group[i].first_row;
        experts.pack_inner(plan.group[i], unpacked.data() + row * args.ffn_dim,
                           inner.data() + row * inner_size);
      }
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < args.hidden; first += kLanes) {
      project_down<T>(experts, args, plan, inner.data(), first_token, tokens, first,
                      scratch.data());
    }
  }
}

// The whole op; T is the element of x and out.
template <typename T, typename Experts, typename Args>
void run_experts(const Experts& experts, const Args& args, int threads) {
  const int64_t tokens_at_once = kMaxPairs / args.top_k;
  for (int64_t first = 0; first < args.tokens; first += tokens_at_once) {
    const int64_t tokens = std::min(tokens_at_once, args.tokens - first);
    run_tokens<T>(experts, args, first, tokens, threads);
  }
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

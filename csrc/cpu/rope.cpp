// rope and rope_ on the CPU: one pass, out of place or in place.
//
// A token costs 2 * (q_heads + kv_heads) * head_dim * itemsize bytes of memory traffic (each
// element is read and written; the row of cos and sin, 4 * head_dim bytes, is fetched once for all
// heads) and 3.5 operations an element. A write to fresh memory also reads it first, so the
// out-of-place form moves half as much again.
#include "cpu/dispatch.h"
#include "cpu/rotate.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

// The heads of one token at a position; a negative one leaves them as they are.
template <typename T>
void rotate_heads(const Rope& args, const RopeHeads& x, int64_t token, int64_t position,
                  float scale) {
  const T* from = static_cast<const T*>(x.from) + token * x.stride_from_token;
  T* to = static_cast<T*>(x.to) + token * x.stride_to_token;
  for (int64_t head = 0; head < x.heads; ++head) {
    if (position >= 0) {
      rotate(from, to, args.cos + position * args.stride_cos, args.sin + position * args.stride_sin,
             args.head_dim, args.interleaved, scale);
    } else if (to != from) {
      std::memcpy(to, from, args.head_dim * sizeof(T));
    }
    from += x.stride_from_head;
    to += x.stride_to_head;
  }
}

template <typename T>
void rotate_tokens(const Rope& args, int threads) {
  const int64_t elements = args.tokens * (args.q.heads + args.k.heads) * args.head_dim;
#pragma omp parallel for schedule(static) num_threads(team(threads, elements))
  for (int64_t token = 0; token < args.tokens; ++token) {
    const int64_t position = args.positions[token];
    const bool scaled = args.q_scale != nullptr && position >= 0;
    rotate_heads<T>(args, args.q, token, position, scaled ? args.q_scale[position] : 1.0f);
    rotate_heads<T>(args, args.k, token, position, 1.0f);
  }
}

}  // namespace

void rope(const Rope& args, int threads) {
  with_dtype(args.dtype, [&](auto element) { rotate_tokens<decltype(element)>(args, threads); });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

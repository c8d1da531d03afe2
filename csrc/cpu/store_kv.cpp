// store_kv_ on the CPU: a copy, or a rounding copy, of rows into the pages of a ring.
//
// A token costs 2 * kv_heads * head_dim elements read and as many written. Rows of a head are
// scattered over k and v, but follow each other in a page.
#include "cpu/dispatch.h"
#include "cpu/ring.h"
#include "launchers.h"

namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH {
namespace {

// Stores one head's rows of one sequence, at positions first..end-1. `x` is the row of `first`.
template <typename T, typename Cache>
void store_head(const Ring& ring, const Pages& pages, int64_t sequence, int64_t head, int64_t first,
                int64_t end, const T* x, int64_t stride_token, int64_t head_dim) {
  const float scale = scale_of(pages, head);
  for_runs<Cache>(ring, pages, sequence, head, first, end,
                  [&](Cache* row, int64_t run, int64_t count) {
                    for (int64_t i = 0; i < count; ++i) {
                      const T* from = x + (run + i - first) * stride_token;
                      write_row(from, row + i * pages.stride_row, head_dim, scale);
                    }
                  });
}

template <typename T, typename Cache>
void store_rows(const StoreKv& args, int threads) {
  const int64_t capacity = args.ring.pages_per_seq * args.ring.page_size;
  const int64_t elements = 2 * args.tokens * args.kv_heads * args.head_dim;
#pragma omp parallel for collapse(2) schedule(static) num_threads(team(threads, elements))
  for (int64_t sequence = 0; sequence < args.batch; ++sequence) {
    for (int64_t i = 0; i < 2 * args.kv_heads; ++i) {  // all heads of k, then all of v
      const int64_t head = i % args.kv_heads;
      const HeadRows& rows = i < args.kv_heads ? args.k : args.v;
      const int64_t begin = args.cu_seqlens[sequence];
      const int64_t context = args.context_lens[sequence];
      const int64_t end = context + args.cu_seqlens[sequence + 1] - begin;
      const int64_t first = std::max({int64_t{0}, context, end - capacity});
      const T* x = static_cast<const T*>(rows.data) +
                   (begin + first - context) * rows.stride_token + head * rows.stride_head;
      store_head<T, Cache>(args.ring, i < args.kv_heads ? args.ring.k : args.ring.v, sequence, head,
                           first, end, x, rows.stride_token, args.head_dim);
    }
  }
}

}  // namespace

void store_kv(const StoreKv& args, int threads) {
  with_dtype(args.dtype, [&](auto element) {
    with_cache_of<decltype(element)>(args.ring.dtype, [&](auto stored) {
      store_rows<decltype(element), decltype(stored)>(args, threads);
    });
  });
}

}  // namespace mistral_kernels::cpu::MISTRAL_KERNELS_PATH

// What bindings.cpp calls: one launcher a device, on raw pointers, checked by the Python caller.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mistral_kernels {

// out = round(value * rsqrt(mean(value^2) + eps) * weight), value = x or round(x + residual).
struct RmsNorm {
  const void* x;         // (tokens, hidden), last dimension contiguous
  const void* residual;  // (tokens, hidden), last dimension contiguous; null: plain rms_norm
  const void* weight;    // (hidden,), dtype of x
  void* out;             // (tokens, hidden), contiguous
  void* summed;          // (tokens, hidden), contiguous: round(x + residual); null as residual is
  int64_t tokens;        // 0 is a no-op
  int64_t hidden;
  int64_t stride_x_token;         // in elements
  int64_t stride_residual_token;  // in elements
  float eps;
  Dtype dtype;
};

// One of the two cache tensors of a layer, (pages, page_size, kv_heads, head_dim) with any memory
// order; the last dimension is contiguous. Strides in elements.
struct Pages {
  void* data;
  int64_t stride_page;
  int64_t stride_row;
  int64_t stride_head;
  const float* scale;    // of a quantised cache, else null
  int64_t stride_scale;  // 0: one scale for all heads, 1: one a head
};

// The rolling cache of a layer: position p of sequence b lives in slot p % capacity, where capacity
// is pages_per_seq * page_size, on page block_table[b][slot / page_size].
struct Ring {
  Pages k;
  Pages v;
  const int32_t* block_table;  // (batch, pages_per_seq); null: there is no cache
  int64_t stride_table;        // in elements
  int64_t pages_per_seq;
  int64_t page_size;
  Dtype dtype;  // of both caches
};

// softmax(q k^T * scale) v of packed, ragged sequences; their keys are the ring's and the new ones.
struct PrefillAttention {
  const void* q;  // (tokens, q_heads, head_dim), last dimension contiguous
  const void* k;  // (tokens, kv_heads, head_dim), likewise; null as v is: already in the ring
  const void* v;
  void* out;                    // (tokens, q_heads, head_dim), contiguous
  float* lse;                   // (tokens, q_heads), contiguous
  const int32_t* cu_seqlens;    // (batch + 1,)
  const int32_t* context_lens;  // (batch,), tokens in the ring before these; null: 0
  const int32_t* starts;        // (batch,), first position that may be seen; null: 0
  int64_t batch;
  int64_t tokens;  // 0 is a no-op
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t stride_q_token;  // in elements, as all strides
  int64_t stride_q_head;
  int64_t stride_k_token;
  int64_t stride_k_head;
  int64_t stride_v_token;
  int64_t stride_v_head;
  int64_t window;  // 0: all keys
  bool causal;
  float scale;
  Dtype dtype;  // of q, k, v and out
  Ring ring;
};

// Each file of csrc/cpu is compiled once for each of these instruction sets (setup.py), oldest
// first; a machine that runs one runs all before it. Expands to apply(name, ...) for each. A build
// without CPU kernels defines it as empty.
#if defined(MISTRAL_KERNELS_PATHS)
#elif defined(__x86_64__)
#define MISTRAL_KERNELS_PATHS(apply, ...)                                          \
  apply(portable, __VA_ARGS__) apply(avx2, __VA_ARGS__) apply(avx512, __VA_ARGS__) \
      apply(avx512_bf16, __VA_ARGS__)
#else
#define MISTRAL_KERNELS_PATHS(apply, ...) apply(portable, __VA_ARGS__)
#endif

// `threads` of torch's OpenMP pool take part; the bits do not depend on how many.
#define MISTRAL_KERNELS_DECLARE(path, ...)                           \
  namespace cpu::path {                                              \
  void rms_norm(const RmsNorm& args, int threads);                   \
  void prefill_attention(const PrefillAttention& args, int threads); \
  }
MISTRAL_KERNELS_PATHS(MISTRAL_KERNELS_DECLARE, )
#undef MISTRAL_KERNELS_DECLARE

namespace cuda {
// Runs on `device` and its `stream` (a cudaStream_t). Throws std::runtime_error naming the op.
void rms_norm(const RmsNorm& args, int device, void* stream);

// As CUDA writes them, 1000 * major + 10 * minor. The driver is 0 where there is none.
int driver_version();
int runtime_version();
}  // namespace cuda

}  // namespace mistral_kernels

// What bindings.cpp calls: one launcher a device, on raw pointers, checked by the Python caller.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mistral_kernels {

// A tensor (tokens, heads, head_dim), last dimension contiguous. Strides in elements.
struct HeadRows {
  const void* data;  // null: absent
  int64_t stride_token;
  int64_t stride_head;
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

// The rolling cache of a layer: position p of sequence b lives in slot p % capacity, where
// capacity is pages_per_seq * page_size, on page block_table[b][slot / page_size].
struct Ring {
  Pages k;
  Pages v;
  const int32_t* block_table;  // (batch, pages_per_seq); null: there is no cache
  int64_t stride_table;        // in elements
  int64_t pages_per_seq;
  int64_t page_size;
  Dtype dtype;  // of both caches
};

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

// One tensor that rope rotates, (tokens, heads, head_dim), last dimension contiguous. `to` is
// `from` with the same strides in place, else memory that `from` does not touch. Strides in
// elements.
struct RopeHeads {
  const void* from;
  void* to;
  int64_t heads;
  int64_t stride_from_token;
  int64_t stride_from_head;
  int64_t stride_to_token;
  int64_t stride_to_head;
};

// to = round(from rotated by its row of cos and sin, q then multiplied by q_scale). Rows with a
// negative position stay as they are.
struct Rope {
  RopeHeads q;
  RopeHeads k;
  const float* cos;          // (max_positions, head_dim / 2), last dimension contiguous
  const float* sin;          // likewise
  const float* q_scale;      // (max_positions,), contiguous; null: 1
  const int32_t* positions;  // (tokens,), contiguous, < max_positions
  int64_t tokens;            // 0 is a no-op
  int64_t head_dim;          // even
  int64_t stride_cos;        // in elements
  int64_t stride_sin;        // in elements
  bool interleaved;          // pairs (0, 1), (2, 3), ..; else (0, head_dim / 2), ..
  Dtype dtype;
};

// Row i of sequence b goes to position context_lens[b] + i - cu_seqlens[b] of the ring; rows of a
// negative position, and those that later rows of the call overwrite, are not written.
struct StoreKv {
  HeadRows k;  // (tokens, kv_heads, head_dim), dtype
  HeadRows v;
  Ring ring;                    // of dtype, or quantised
  const int32_t* cu_seqlens;    // (batch + 1,)
  const int32_t* context_lens;  // (batch,)
  int64_t batch;
  int64_t tokens;
  int64_t kv_heads;
  int64_t head_dim;
  Dtype dtype;
};

// softmax(q k^T * scale) v of packed, ragged sequences; their keys are the ring's and the new ones.
struct PrefillAttention {
  HeadRows q;  // (tokens, q_heads, head_dim), dtype
  HeadRows k;  // (tokens, kv_heads, head_dim), dtype; null as v is: already in the ring
  HeadRows v;
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
  int64_t window;  // 0: all keys
  bool causal;
  float scale;
  Dtype dtype;  // of q, k, v and out
  Ring ring;
};

// How decode_attention on CUDA cuts the keys of a sequence, and where its partials go.
struct KeySplits {
  void* workspace;         // counters, one a block of splits, then partials; null: one split
  int64_t counter_bytes;   // where partials begin; a multiple of 16
  int32_t splits;          // of the grid, at least those of any sequence
  int32_t most_splits;     // that a sequence may have
  int32_t tiles_at_least;  // of a split
  int32_t heads;           // of a group that a block works, 1 to 8
};

// One new token a sequence: rotates q and k, writes k and v to the ring, attends over the newest
// `window` keys from max(0, starts) on. A row of negative position gets out 0 and lse -inf.
struct DecodeAttention {
  HeadRows q;  // (batch, q_heads, head_dim), dtype
  HeadRows k;  // (batch, kv_heads, head_dim), dtype; null with v: already in the ring
  HeadRows v;
  void* out;                 // (batch, q_heads, head_dim), contiguous, dtype
  float* lse;                // (batch, q_heads), contiguous
  Ring ring;                 // of dtype, or quantised
  const int32_t* positions;  // (batch,)
  const int32_t* starts;     // (batch,); null: 0
  const float* cos;          // (max_positions, head_dim / 2); null with sin: already rotated
  const float* sin;
  int64_t stride_cos;    // in elements
  int64_t stride_sin;    // in elements
  const float* q_scale;  // (max_positions,); null: 1
  bool interleaved;
  int64_t batch;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t window;  // at most the ring's capacity
  float scale;
  Dtype dtype;
  KeySplits cut;  // CUDA only
};

// The top_k largest logits of each row, lowest index first among equals, and their softmax.
struct RouteExperts {
  const void* logits;        // (tokens, experts), last dimension contiguous
  const int32_t* positions;  // (tokens,), contiguous: negative is idle; null: no row is
  float* weights;            // (tokens, top_k), contiguous; 0 in idle rows
  int32_t* expert_ids;       // (tokens, top_k), contiguous; -1 in idle rows
  int64_t tokens;            // 0 is a no-op
  int64_t experts;
  int64_t top_k;         // 1 <= top_k <= experts
  int64_t stride_token;  // of logits, in elements
  Dtype dtype;
};

// out = round(sum over slots of weights[slot] * w2[e] (silu(gate) * up)), (gate, up) = w13[e] x
// and e = expert_ids[slot]; ids outside [0, experts) skip their slot. Last dimensions are
// contiguous, strides are in elements.
struct ExpertMlp {
  const void* x;              // (tokens, hidden)
  const void* w13;            // (experts, 2 * ffn_dim, hidden), gate rows first, dtype of x
  const void* w2;             // (experts, hidden, ffn_dim), dtype of x
  const float* weights;       // (tokens, top_k)
  const int32_t* expert_ids;  // (tokens, top_k)
  void* out;                  // (tokens, hidden), contiguous
  int64_t tokens;             // 0 is a no-op
  int64_t hidden;
  int64_t ffn_dim;
  int64_t experts;
  int64_t top_k;  // 1 to 256
  int64_t stride_x_token;
  int64_t stride_w13_expert;
  int64_t stride_w13_row;
  int64_t stride_w2_expert;
  int64_t stride_w2_row;
  int64_t stride_weights_token;
  int64_t stride_ids_token;
  Dtype dtype;
  void* inner;  // (tokens * top_k, ffn_dim), dtype: workspace on CUDA, null on the CPU
};

// out = round(silu(gate) * up)
struct SiluMul {
  const void* gate_up;  // (tokens, 2 * ffn_dim), gate first, last dimension contiguous
  void* out;            // (tokens, ffn_dim), contiguous
  int64_t tokens;       // 0 is a no-op
  int64_t ffn_dim;
  int64_t stride_token;  // of gate_up, in elements
  Dtype dtype;
};

// out[row][o] = round(sum over i of x[row][i] * weight[o][i]).
struct Linear {
  const void* x;       // (rows, in_dim), last dimension contiguous
  const void* weight;  // (out_dim, in_dim), last dimension contiguous, dtype of x
  void* out;           // (rows, out_dim), contiguous
  int64_t rows;        // 0 is a no-op
  int64_t in_dim;
  int64_t out_dim;
  int64_t stride_x_row;       // in elements
  int64_t stride_weight_row;  // in elements
  Dtype dtype;
};

// A weight in the layout of ops/low_bit.py, (..., rows, columns): leading dimensions are experts.
struct LowBit {
  const void* qweight;  // codes
  const void* scales;   // (..., rows, columns / group_size), scale_dtype
  const void* zeros;    // likewise, one byte each; null: the code of 0 is 8 (kInt4) or 0
  const int32_t* perm;  // (..., columns): of x, the column that belongs to each; null: in order
  int64_t group_size;   // at least 1
  Dtype codes;          // kInt4, kInt8 or kFloat8
  Dtype scale_dtype;
};

// out[row][o] = round(sum over i of x[row][perm[i]] * weight[o][i]).
struct LinearLowBit {
  const void* x;  // (rows, in_dim), last dimension contiguous
  LowBit weight;  // (out_dim, in_dim)
  void* out;      // (rows, out_dim), contiguous
  int64_t rows;   // 0 is a no-op
  int64_t in_dim;
  int64_t out_dim;
  int64_t stride_x_row;  // in elements
  Dtype dtype;
};

// ExpertMlp with low-bit weights.
struct ExpertMlpLowBit {
  const void* x;              // (tokens, hidden)
  LowBit w13;                 // (experts, 2 * ffn_dim, hidden), gate rows first
  LowBit w2;                  // (experts, hidden, ffn_dim), codes and scale_dtype of w13
  const float* weights;       // (tokens, top_k)
  const int32_t* expert_ids;  // (tokens, top_k)
  void* out;                  // (tokens, hidden), contiguous
  int64_t tokens;             // 0 is a no-op
  int64_t hidden;
  int64_t ffn_dim;
  int64_t experts;
  int64_t top_k;
  int64_t stride_x_token;  // in elements, as those below
  int64_t stride_weights_token;
  int64_t stride_ids_token;
  Dtype dtype;
  void* inner;  // (tokens * top_k, ffn_dim), dtype: workspace on CUDA
};

// out[row][i] = round(weight[row][i]), columns in the order of the codes.
struct Dequantise {
  LowBit weight;  // (rows, in_dim); perm is not looked at
  void* out;      // (rows, in_dim), contiguous
  int64_t rows;
  int64_t in_dim;
  Dtype dtype;  // of out
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
  void rope(const Rope& args, int threads);                          \
  void store_kv(const StoreKv& args, int threads);                   \
  void prefill_attention(const PrefillAttention& args, int threads); \
  void decode_attention(const DecodeAttention& args, int threads);   \
  void route_experts(const RouteExperts& args, int threads);         \
  void expert_mlp(const ExpertMlp& args, int threads);               \
  void silu_mul(const SiluMul& args, int threads);                   \
  void linear(const Linear& args, int threads);                      \
  void linear_low_bit(const LinearLowBit& args, int threads);        \
  void expert_mlp_low_bit(const ExpertMlpLowBit& args, int threads); \
  void dequantise(const Dequantise& args, int threads);              \
  }
MISTRAL_KERNELS_PATHS(MISTRAL_KERNELS_DECLARE, )
#undef MISTRAL_KERNELS_DECLARE

namespace cuda {
// Runs on `device` and its `stream` (a cudaStream_t). Throws std::runtime_error naming the op.
void rms_norm(const RmsNorm& args, int device, void* stream);
void decode_attention(const DecodeAttention& args, int device, void* stream);
void rope(const Rope& args, int device, void* stream);
void store_kv(const StoreKv& args, int device, void* stream);
void route_experts(const RouteExperts& args, int device, void* stream);
void silu_mul(const SiluMul& args, int device, void* stream);
// Up to 16 tokens and 64 (token, slot) pairs, 16 bits; rows of x, w13 and w2 are whole 16-byte
// vectors on 16-byte boundaries.
void expert_mlp(const ExpertMlp& args, int device, void* stream);
// Up to 8 rows, 16 bits; rows of x and of codes are whole 16-byte vectors on 16-byte boundaries,
// and groups are multiples of 32 or whole rows.
void linear_low_bit(const LinearLowBit& args, int device, void* stream);
// The same of up to 8 tokens and 64 (token, slot) pairs.
void expert_mlp_low_bit(const ExpertMlpLowBit& args, int device, void* stream);

// As CUDA writes them, 1000 * major + 10 * minor. The driver is 0 where there is none.
int driver_version();
int runtime_version();
}  // namespace cuda

}  // namespace mistral_kernels

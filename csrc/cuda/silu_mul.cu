// silu_mul on CUDA: out = gate / (1 + exp(-gate)) * up, one pass.
//
// A token moves 3 * ffn_dim * itemsize bytes (gate and up in, out out) for about 25 instructions an
// element, on H200 two thirds of what it issues in that time: memory bounds it at every size. 4096
// tokens of ffn_dim 14336 in bf16 are 352 MB: predicted at the data sheets' bandwidth are 173 us on
// A100 (2.0 TB/s), 105 on H100 (3.35) and 73 on H200 (4.8); its time is not measured. A thread has
// one vector of gate and one of up in flight, so 2048 of them on an SM 64 KB, where H200's latency
// wants some 30 KB.
#include "cuda/convert.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "launchers.h"

namespace mistral_kernels::cuda {
namespace {

// Not measured. A token of 14336 in bf16 is 14 blocks, so that one alone already fills 14 SMs.
constexpr int kThreads = 128;

// Grid (tokens, pieces of a row). A block owns kThreads vectors of one row, a thread one of them.
// codegen: silu_mul_kernel<*, true> is due load_16
// codegen: silu_mul_kernel<*, true> is due store_16
// codegen: silu_mul_kernel moves 352e6 bytes, does 352e6 operations for 4096 tokens of 14336
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const T* __restrict__ gate_up,  // (tokens, 2 * ffn_dim), gate first
                    T* __restrict__ out,            // (tokens, ffn_dim), contiguous
                    int ffn_dim, int64_t stride_token) {
  constexpr int kWidth = Vector<T>::kWidth;
  const int64_t token = blockIdx.x;
  // 32 bits hold any column, and with 64 nvcc 13.0 splits the 16-byte store into four.
  const int column = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  const int left = ffn_dim - column;
  if (left <= 0) return;

  const T* row = gate_up + token * stride_token + column;
  Vector<T> gates = load_vector<kWhole>(row, left);
  const Vector<T> ups = load_vector<kWhole>(row + ffn_dim, left);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float gate = to_float(gates.values[i]);
    // exp overflows below -88, where the quotient's limit, -0, is right.
    gates.values[i] = from_float<T>(gate / (1.0f + expf(-gate)) * to_float(ups.values[i]));
  }
  store_vector<kWhole>(out + token * ffn_dim + column, gates, left);
}

template <typename T>
void launch_silu_mul(const SiluMul& args, void* stream) {
  constexpr int64_t kPiece = kThreads * Vector<T>::kWidth;
  const bool whole = rows_are_vectors<T>(args.gate_up, args.ffn_dim, args.stride_token) &&
                     rows_are_vectors<T>(args.out, args.ffn_dim);
  const dim3 grid(static_cast<unsigned>(args.tokens),
                  static_cast<unsigned>((args.ffn_dim + kPiece - 1) / kPiece));
  launch("silu_mul", whole ? silu_mul_kernel<T, true> : silu_mul_kernel<T, false>, grid,
         dim3(kThreads), 0, stream, static_cast<const T*>(args.gate_up), static_cast<T*>(args.out),
         static_cast<int>(args.ffn_dim), args.stride_token);
}

}  // namespace

void silu_mul(const SiluMul& args, int device, void* stream) {
  if (args.tokens == 0 || args.ffn_dim == 0) return;
  const DeviceGuard guard(device, "silu_mul");
  with_dtype("silu_mul", args.dtype,
             [&](auto element) { launch_silu_mul<decltype(element)>(args, stream); });
}

}  // namespace mistral_kernels::cuda

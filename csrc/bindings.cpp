// mistral_kernels._C: the launchers as Python functions on integers. The only pybind11 file.
//
// Pointers and streams arrive as integers (Tensor.data_ptr(), Stream.cuda_stream), strides in
// elements, dtypes as Dtype's values. Nothing is checked here: the ops in Python do that. CPU
// functions take two more integers at the end, threads and an index of instruction_sets(), CUDA
// functions device and stream. Those of `later` take what the CPU functions take and make no call:
// they return it, to be made as often as wanted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "launchers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace mistral_kernels {
namespace {

using Address = std::uintptr_t;  // of the first element; 0 where a tensor is absent

// The instruction sets that were built, oldest first.
std::vector<std::string> built_instruction_sets() {
#define MISTRAL_KERNELS_NAME(path, ...) #path,
  return {MISTRAL_KERNELS_PATHS(MISTRAL_KERNELS_NAME, )};
}

#if defined(__x86_64__)
// A name that not every compiler's __builtin_cpu_supports knows.
bool runs_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// Those of them that this machine runs.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names = built_instruction_sets();
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && runs_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  names.resize(std::min<size_t>(names.size(), 1 + avx2 + avx512 + bf16));
#endif
  return names;
}

template <typename Args>
using CpuLauncher = void (*)(const Args& args, int threads);

// A call whose integers have been taken from Python.
struct Call {
  std::string op;
  std::function<void()> make;
};

struct Calls {
  std::vector<Call> calls;

  void make() const {
    for (const Call& call : calls) call.make();
  }
};

using NoGil = py::call_guard<py::gil_scoped_release>;

// Defines a Python function that takes what `pack` takes, then threads and an index of
// instruction_sets(), and its namesake in `later`.
template <typename Args, typename... Fields>
void on_cpu(py::module_& m, py::module_& later, const char* name, Args (*pack)(Fields...),
            std::vector<CpuLauncher<Args>> launchers) {
  launchers.resize(instruction_sets().size());
  m.def(
      name,
      [pack, launchers](Fields... fields, int threads, size_t path) {
        launchers.at(path)(pack(fields...), threads);
      },
      NoGil());
  later.def(name, [name, pack, launchers](Fields... fields, int threads, size_t path) {
    return Call{name, [args = pack(fields...), launch = launchers.at(path), threads] {
                  launch(args, threads);
                }};
  });
}
#define MISTRAL_KERNELS_LAUNCHER(path, op) cpu::path::op,
#define MISTRAL_KERNELS_ON_CPU(op) \
  on_cpu(m, later, #op "_cpu", &op##_args, {MISTRAL_KERNELS_PATHS(MISTRAL_KERNELS_LAUNCHER, op)})

#ifdef MISTRAL_KERNELS_CUDA
// A Python function that takes what `pack` takes, then device and stream.
template <typename Args, typename... Fields>
auto on_cuda(Args (*pack)(Fields...),
             void (*launcher)(const Args& args, int device, void* stream)) {
  return [pack, launcher](Fields... fields, int device, Address stream) {
    launcher(pack(fields...), device, reinterpret_cast<void*>(stream));
  };
}

py::tuple cuda_versions() {
  return py::make_tuple(cuda::driver_version(), cuda::runtime_version());
}
#endif

// Becomes a pointer of the type that a struct's field has.
struct At {
  Address address;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

using HeadRowsFields = std::tuple<Address, int64_t, int64_t>;
using PagesFields = std::tuple<Address, int64_t, int64_t, int64_t, Address, int64_t>;
using RingFields = std::tuple<PagesFields, PagesFields, Address, int64_t, int64_t, int64_t, int>;

Pages pages(const PagesFields& fields) {
  const auto [data, stride_page, stride_row, stride_head, scale, stride_scale] = fields;
  return {At{data}, stride_page, stride_row, stride_head, At{scale}, stride_scale};
}

// What `head_rows` of ops/ring.py returns.
HeadRows head_rows(const HeadRowsFields& fields) {
  const auto [data, stride_token, stride_head] = fields;
  return {At{data}, stride_token, stride_head};
}

// What `ring_fields` of ops/ring.py returns.
Ring ring(const RingFields& fields) {
  const auto& [k, v, block_table, stride_table, pages_per_seq, page_size, dtype] = fields;
  return {pages(k),      pages(v),  At{block_table}, stride_table,
          pages_per_seq, page_size, Dtype(dtype)};
}

using KeySplitsFields = std::tuple<Address, int64_t, int32_t, int32_t, int32_t, int32_t>;

KeySplits key_splits(const KeySplitsFields& fields) {
  const auto [workspace, counter_bytes, splits, most_splits, tiles_at_least, heads] = fields;
  return {At{workspace}, counter_bytes, splits, most_splits, tiles_at_least, heads};
}

// from, to, heads, then the strides of tokens and heads of both.
using RopeHeadsFields = std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t, int64_t>;

RopeHeads rope_heads(const RopeHeadsFields& fields) {
  const auto [from, to, heads, from_token, from_head, to_token, to_head] = fields;
  return {At{from}, At{to}, heads, from_token, from_head, to_token, to_head};
}

// qweight, scales, zeros, perm, group_size, then the dtypes of codes and scales.
using LowBitFields = std::tuple<Address, Address, Address, Address, int64_t, int, int>;

LowBit low_bit(const LowBitFields& fields) {
  const auto [qweight, scales, zeros, perm, group_size, codes, scale_dtype] = fields;
  return {At{qweight}, At{scales},   At{zeros},         At{perm},
          group_size,  Dtype(codes), Dtype(scale_dtype)};
}

// ---- The arguments of each op, in the order of its struct in launchers.h.

RmsNorm rms_norm_args(Address x, Address residual, Address weight, Address out, Address summed,
                      int64_t tokens, int64_t hidden, int64_t stride_x_token,
                      int64_t stride_residual_token, float eps, int dtype) {
  return {
      At{x},          At{residual},          At{weight}, At{out},     At{summed}, tokens, hidden,
      stride_x_token, stride_residual_token, eps,        Dtype(dtype)};
}

Rope rope_args(const RopeHeadsFields& q, const RopeHeadsFields& k, Address cos, Address sin,
               Address q_scale, Address positions, int64_t tokens, int64_t head_dim,
               int64_t stride_cos, int64_t stride_sin, bool interleaved, int dtype) {
  return {rope_heads(q), rope_heads(k), At{cos},    At{sin},    At{q_scale}, At{positions},
          tokens,        head_dim,      stride_cos, stride_sin, interleaved, Dtype(dtype)};
}

StoreKv store_kv_args(const HeadRowsFields& k, const HeadRowsFields& v, const RingFields& fields,
                      Address cu_seqlens, Address context_lens, int64_t batch, int64_t tokens,
                      int64_t kv_heads, int64_t head_dim, int dtype) {
  return {head_rows(k), head_rows(v), ring(fields), At{cu_seqlens}, At{context_lens},
          batch,        tokens,       kv_heads,     head_dim,       Dtype(dtype)};
}

PrefillAttention prefill_attention_args(const HeadRowsFields& q, const HeadRowsFields& k,
                                        const HeadRowsFields& v, Address out, Address lse,
                                        Address cu_seqlens, Address context_lens, Address starts,
                                        int64_t batch, int64_t tokens, int64_t q_heads,
                                        int64_t kv_heads, int64_t head_dim, int64_t window,
                                        bool causal, float scale, int dtype,
                                        const RingFields& fields) {
  return {head_rows(q),     head_rows(k), head_rows(v), At{out}, At{lse},      At{cu_seqlens},
          At{context_lens}, At{starts},   batch,        tokens,  q_heads,      kv_heads,
          head_dim,         window,       causal,       scale,   Dtype(dtype), ring(fields)};
}

DecodeAttention decode_attention_args(const HeadRowsFields& q, const HeadRowsFields& k,
                                      const HeadRowsFields& v, Address out, Address lse,
                                      const RingFields& fields, Address positions, Address starts,
                                      Address cos, Address sin, int64_t stride_cos,
                                      int64_t stride_sin, Address q_scale, bool interleaved,
                                      int64_t batch, int64_t q_heads, int64_t kv_heads,
                                      int64_t head_dim, int64_t window, float scale, int dtype,
                                      const KeySplitsFields& cut) {
  return {head_rows(q),  head_rows(k), head_rows(v), At{out},        At{lse},    ring(fields),
          At{positions}, At{starts},   At{cos},      At{sin},        stride_cos, stride_sin,
          At{q_scale},   interleaved,  batch,        q_heads,        kv_heads,   head_dim,
          window,        scale,        Dtype(dtype), key_splits(cut)};
}

RouteExperts route_experts_args(Address logits, Address positions, Address weights,
                                Address expert_ids, int64_t tokens, int64_t experts, int64_t top_k,
                                int64_t stride_token, int dtype) {
  return {At{logits}, At{positions}, At{weights},  At{expert_ids}, tokens,
          experts,    top_k,         stride_token, Dtype(dtype)};
}

ExpertMlp expert_mlp_args(Address x, Address w13, Address w2, Address weights, Address expert_ids,
                          Address out, int64_t tokens, int64_t hidden, int64_t ffn_dim,
                          int64_t experts, int64_t top_k, int64_t stride_x_token,
                          int64_t stride_w13_expert, int64_t stride_w13_row,
                          int64_t stride_w2_expert, int64_t stride_w2_row,
                          int64_t stride_weights_token, int64_t stride_ids_token, int dtype,
                          Address inner) {
  return {At{x},
          At{w13},
          At{w2},
          At{weights},
          At{expert_ids},
          At{out},
          tokens,
          hidden,
          ffn_dim,
          experts,
          top_k,
          stride_x_token,
          stride_w13_expert,
          stride_w13_row,
          stride_w2_expert,
          stride_w2_row,
          stride_weights_token,
          stride_ids_token,
          Dtype(dtype),
          At{inner}};
}

SiluMul silu_mul_args(Address gate_up, Address out, int64_t tokens, int64_t ffn_dim,
                      int64_t stride_token, int dtype) {
  return {At{gate_up}, At{out}, tokens, ffn_dim, stride_token, Dtype(dtype)};
}

Linear linear_args(Address x, Address weight, Address out, int64_t rows, int64_t in_dim,
                   int64_t out_dim, int64_t stride_x_row, int64_t stride_weight_row, int dtype) {
  return {At{x},   At{weight},   At{out},           rows,        in_dim,
          out_dim, stride_x_row, stride_weight_row, Dtype(dtype)};
}

LinearLowBit linear_low_bit_args(Address x, const LowBitFields& weight, Address out, int64_t rows,
                                 int64_t in_dim, int64_t out_dim, int64_t stride_x_row, int dtype) {
  return {At{x}, low_bit(weight), At{out}, rows, in_dim, out_dim, stride_x_row, Dtype(dtype)};
}

ExpertMlpLowBit expert_mlp_low_bit_args(Address x, const LowBitFields& w13, const LowBitFields& w2,
                                        Address weights, Address expert_ids, Address out,
                                        int64_t tokens, int64_t hidden, int64_t ffn_dim,
                                        int64_t experts, int64_t top_k, int64_t stride_x_token,
                                        int64_t stride_weights_token, int64_t stride_ids_token,
                                        int dtype, Address inner) {
  return {At{x},
          low_bit(w13),
          low_bit(w2),
          At{weights},
          At{expert_ids},
          At{out},
          tokens,
          hidden,
          ffn_dim,
          experts,
          top_k,
          stride_x_token,
          stride_weights_token,
          stride_ids_token,
          Dtype(dtype),
          At{inner}};
}

Dequantise dequantise_args(const LowBitFields& weight, Address out, int64_t rows, int64_t in_dim,
                           int dtype) {
  return {low_bit(weight), At{out}, rows, in_dim, Dtype(dtype)};
}

std::string compiler() {
#ifdef __clang__
  return __VERSION__;  // "Clang 17.0.6"
#else
  return "GCC " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
  info["instruction_sets"] = built_instruction_sets();
#ifdef MISTRAL_KERNELS_CUDA
  const int version = cuda::runtime_version();
  info["cuda"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["cuda_archs"] = MISTRAL_KERNELS_CUDA;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of mistral_kernels on raw pointers; import torch first.";
  m.def("build_info", &build_info, "What this extension was built with; None where not built.");
  m.def("instruction_sets", &instruction_sets, "What this machine runs of what was built.");
  py::class_<Call>(m, "Call").def_readonly("op", &Call::op);
  py::class_<Calls>(m, "Calls", "Calls that are made one after another.")
      .def(py::init<std::vector<Call>>())
      .def("make", &Calls::make, NoGil());
  py::module_ later = m.def_submodule("later", "The CPU functions; they return a Call.");
  MISTRAL_KERNELS_ON_CPU(rms_norm);
  MISTRAL_KERNELS_ON_CPU(rope);
  MISTRAL_KERNELS_ON_CPU(store_kv);
  MISTRAL_KERNELS_ON_CPU(prefill_attention);
  MISTRAL_KERNELS_ON_CPU(decode_attention);
  MISTRAL_KERNELS_ON_CPU(route_experts);
  MISTRAL_KERNELS_ON_CPU(expert_mlp);
  MISTRAL_KERNELS_ON_CPU(silu_mul);
  MISTRAL_KERNELS_ON_CPU(linear);
  MISTRAL_KERNELS_ON_CPU(linear_low_bit);
  MISTRAL_KERNELS_ON_CPU(expert_mlp_low_bit);
  MISTRAL_KERNELS_ON_CPU(dequantise);
#ifdef MISTRAL_KERNELS_CUDA
  m.def("cuda_versions", &cuda_versions, "(driver, runtime), 13000 for 13.0; driver 0 if absent.");
  m.def("rms_norm_cuda", on_cuda(&rms_norm_args, &cuda::rms_norm), NoGil());
  m.def("decode_attention_cuda", on_cuda(&decode_attention_args, &cuda::decode_attention), NoGil());
  m.def("rope_cuda", on_cuda(&rope_args, &cuda::rope), NoGil());
  m.def("store_kv_cuda", on_cuda(&store_kv_args, &cuda::store_kv), NoGil());
  m.def("route_experts_cuda", on_cuda(&route_experts_args, &cuda::route_experts), NoGil());
  m.def("silu_mul_cuda", on_cuda(&silu_mul_args, &cuda::silu_mul), NoGil());
  m.def("expert_mlp_cuda", on_cuda(&expert_mlp_args, &cuda::expert_mlp), NoGil());
  m.def("linear_low_bit_cuda", on_cuda(&linear_low_bit_args, &cuda::linear_low_bit), NoGil());
  m.def("expert_mlp_low_bit_cuda", on_cuda(&expert_mlp_low_bit_args, &cuda::expert_mlp_low_bit),
        NoGil());
#endif
}

}  // namespace mistral_kernels

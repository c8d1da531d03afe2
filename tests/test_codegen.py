"""Every kernel compiles for every architecture without a spill; and the checks of that notice."""

import importlib.util

import pytest

from benchmarks import codegen
from benchmarks.codegen import Row

needs_nvcc = pytest.mark.skipif(codegen.find_nvcc() is None, reason="nvcc is not installed")

TRITON_MODULE = """
import triton
import triton.language as tl

@triton.jit
def shown_kernel(x_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)

@triton.jit
def forgotten_kernel(x_ptr):
    tl.store(x_ptr, 0.0)

def codegen_cases(arch):
    signature, config = {"x_ptr": "*fp32"}, {"SIZE": 128, "num_warps": 1}
    case = {"case": "one", "kernel": shown_kernel, "signature": signature, "constexprs": config}
    return [case | {"due": ("mma",)}]
"""

# 64 live values a thread do not fit into the 32 registers that 2048 threads leave to each.
CUDA_SOURCE = """
// codegen: spilling_kernel is due mma
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* data) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = data[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) data[(63 - i) * 1024 + threadIdx.x] = values[i];
}

template <int kSize>
__global__ void forgotten_kernel(float* data) {
  data[kSize] = 0;
}
"""

# The second instantiation moves 4 bytes at a time.
COPIES = """
// codegen: copy_kernel is due load_16
// codegen: copy_kernel<*4> is due store_16
template <typename T>
__global__ void copy_kernel(const T* from, T* to) {
  to[threadIdx.x] = from[threadIdx.x];
}
template __global__ void copy_kernel<float4>(const float4*, float4*);
template __global__ void copy_kernel<float>(const float*, float*);
"""


@needs_nvcc
def test_every_kernel_is_clean(capsys):
    status = codegen.main()
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, []),
        ({"spills": 8}, ["spills 8 bytes"]),
        ({"shared": 167_000}, ["takes 167000 bytes of shared memory"]),
        ({"shared": 167_000, "arch": "sm_90a"}, []),
        ({"due": ("mma", "cp_async"), "counts": {"mma": 0, "cp_async": 3}}, ["has no mma"]),
    ],
)
def test_problems_of_a_row(change, problem):
    fields = dict(language="CUDA", kernel="k", case="", arch="sm_80", registers=32, shared=0)
    assert Row(**fields | {"stack": 0, "spills": 0} | change).problems() == problem


def test_a_triton_kernel_without_a_case_is_noticed(tmp_path):
    path = tmp_path / "one_forgotten.py"
    path.write_text(TRITON_MODULE)
    spec = importlib.util.spec_from_file_location("one_forgotten", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, left_out = codegen.triton_rows(module, tmp_path)
    assert left_out == {"forgotten_kernel"}
    assert {row.kernel for row in rows} == {"shown_kernel"}
    assert all(row.problems() == ["has no mma"] and row.registers > 0 for row in rows)


@needs_nvcc
def test_a_spill_and_an_unused_template_are_noticed(tmp_path):
    path = tmp_path / "bad.cu"
    path.write_text(CUDA_SOURCE)
    rows, left_out = codegen.cuda_rows(codegen.find_nvcc(), path, tmp_path)
    assert left_out == {"forgotten_kernel"}
    assert [row.arch for row in rows] == ["sm_80", "sm_90a"]
    for row in rows:
        spill, missing = row.problems()
        assert spill.startswith("spills ") and missing == "has no mma"


@needs_nvcc
def test_narrow_accesses_are_noticed_where_wide_ones_are_due(tmp_path):
    path = tmp_path / "copies.cu"
    path.write_text(COPIES)
    rows, left_out = codegen.cuda_rows(codegen.find_nvcc(), path, tmp_path)
    assert not left_out
    problems = {(row.case, row.arch): row.problems() for row in rows}
    assert problems == {
        (case, arch): found
        for case, found in (("float4", []), ("float", ["has no load_16"]))
        for arch in codegen.ARCHS.values()
    }

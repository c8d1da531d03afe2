"""Every kernel compiles for every architecture without a spill; and the checks of that notice."""

import importlib.util
import json

import pytest

from benchmarks import codegen, compilers
from benchmarks.machine_code import Row, read_instructions, serialised_kernels
from benchmarks.roofline import Prediction

needs_nvcc = pytest.mark.skipif(compilers.find_nvcc() is None, reason="nvcc is not installed")

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
// codegen: spilling_kernel takes 4096 bytes of shared memory at launch
// codegen: spilling_kernel moves 2.6e5 bytes, does 4e3 operations for one block
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
// codegen: copy_kernel<float> takes 1000 bytes of shared memory
template <typename T>
__global__ void copy_kernel(const T* from, T* to) {
  to[threadIdx.x] = from[threadIdx.x];
}
template __global__ void copy_kernel<float4>(const float4*, float4*);
template __global__ void copy_kernel<float>(const float*, float*);
"""


def fields_of_a_row(**change):
    fields = dict(language="CUDA", kernel="k", case="", arch="sm_80", registers=32, shared=0)
    return fields | {"stack": 0, "spills": 0, "threads": 256} | change


@pytest.fixture
def module_of(tmp_path):
    """Imports a kernel file with this text."""

    def load(text):
        path = tmp_path / "kernel_file.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("kernel_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# What is common for two architectures is four minutes of a core; `python -m benchmarks.codegen`
# compiles all for four.
TESTED, HEADLINE = ["sm_80", "sm_90a"], ["sm_100a"]


def test_every_kernel_is_clean(capsys, tmp_path):
    out = tmp_path / "codegen.json"
    scope = ["--archs", *TESTED, "--common", "--headline", *HEADLINE]
    status = codegen.main([*scope, "--json", str(out)])
    assert status == 0, capsys.readouterr().out
    tables = json.loads(out.read_text())
    assert {row["arch"] for row in tables["rows"]} == {*TESTED, *HEADLINE}
    assert all(row["bytes_in_flight"] > 0 for row in tables["rows"])
    kernels = [
        {(row["language"], row["kernel"]) for row in tables["rows"] if row["arch"] == arch}
        for arch in (*TESTED, *HEADLINE)
    ]
    assert kernels[0] == kernels[1]
    assert kernels[2] == {kernel for kernel in kernels[0] if kernel[0] == "Triton"}
    compiled, predicted = (
        {(row["language"], row["kernel"]) for row in tables[name]}
        for name in ("rows", "predictions")
    )
    assert compiled == predicted, "every kernel says the work of a headline shape"


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({}, []),
        ({"spills": 8}, ["spills 8 bytes"]),
        ({"shared": 167_000}, ["takes 167000 bytes of shared memory"]),
        ({"shared": 167_000, "arch": "sm_90a"}, []),
        ({"registers": 255, "threads": 512}, ["does not fit on a multiprocessor"]),
        ({"due": ("mma", "cp_async"), "counts": {"mma": 0, "cp_async": 3}}, ["has no mma"]),
        ({"due": ("mma",), "counts": {"tcgen05": 1}, "arch": "sm_100a"}, []),
        ({"due": ("wgmma",), "counts": {"mma": 1}}, []),
        ({"due": ("wgmma",), "counts": {"mma": 1}, "arch": "sm_90a"}, ["has no wgmma"]),
        ({"due": ("wgmma",), "counts": {"mma": 1}, "arch": "sm_100a"}, ["has no tcgen05"]),
        ({"due": ("wgmma",), "counts": {"tcgen05": 1}, "arch": "sm_100a"}, []),
        ({"serialised": True}, ["waits behind every wgmma (C7515)"]),
    ],
)
def test_problems_of_a_row(change, problems):
    assert Row(**fields_of_a_row(**change)).problems() == problems


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 8),  # 2048 threads
        ({"arch": "sm_120a"}, 6),  # 1536
        ({"threads": 32}, 32),
        ({"registers": 33}, 6),  # 40 are given out: 12 warps a quarter
        ({"registers": 255, "threads": 128}, 2),
        ({"shared": 60 << 10}, 2),
        ({"shared": 60 << 10, "arch": "sm_90a"}, 3),
        ({"tensor_columns": 256, "arch": "sm_100a"}, 2),
    ],
)
def test_blocks_of_a_multiprocessor(change, blocks):
    assert Row(**fields_of_a_row(**change)).blocks == blocks


def test_bytes_in_flight_fit_where_they_go_to():
    assert Row(**fields_of_a_row(load_bytes=16)).bytes_in_flight == 2048 * 16
    assert Row(**fields_of_a_row(load_bytes=1600)).bytes_in_flight == 65536 * 4
    copies = fields_of_a_row(copy_bytes=64, shared=60 << 10)
    assert Row(**copies).bytes_in_flight == 2 * 256 * 64
    assert Row(**copies | {"copy_bytes": 640}).bytes_in_flight == 2 * (60 << 10)
    assert Row(**copies | {"copy_bytes": 0, "counts": {"tma": 1}}).bytes_in_flight == 2 * (60 << 10)


def test_instructions_are_read():
    found = read_instructions(
        "@P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]\nLDG.E R1, desc\nLDG.E.U16 R1, desc\n"
        "LDGSTS.E.BYPASS.128 [R3], desc\nLDGSTS.E.64 [R3], desc\nSTG.E.128 desc[UR4][R2.64], R4\n"
        "HMMA.16816.F32.BF16 R4, R4\nHGMMA.64x128x16.F32.BF16 R24\n@P1 UTCHMMA gdesc[UR4]\n"
        "UTCATOMSWS.AND URZ\nUTMALDG.2D [UR8]"
    )
    assert (found["load_bytes"], found["copy_bytes"]) == (16 + 4 + 2, 16 + 8)
    counts = {"mma": 1, "wgmma": 1, "tcgen05": 1, "cp_async": 2, "tma": 1}
    counts |= {"load_16": 2, "store_16": 1}
    assert found["counts"] == counts


def test_waits_behind_wgmma_are_read():
    said = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are"
        " serialized due to insufficient register resources in the function 'slow_kernel'\n"
        "ptxas info    : Compiling entry function 'fast_kernel' for 'sm_90a'"
    )
    assert serialised_kernels(said) == {"slow_kernel"}


def test_a_prediction_is_the_longer_of_two_times():
    row = Prediction("CUDA", "k", "a shape", bytes=4.8e9, flops=0)
    assert row.time_us("H200") == pytest.approx(1000) and row.bound_by() == "memory"
    row = row._replace(flops=989e9)
    assert row.time_us("H100") == pytest.approx(4.8e9 / 3.35e6)
    assert row.time_us("A100") == pytest.approx(989e9 / 312e6)
    assert row.bound_by() == "matrix units on A100"
    assert row._replace(flops=1e15).bound_by() == "matrix units"


def test_a_triton_kernel_without_a_case_is_noticed(module_of, monkeypatch, capsys):
    module = module_of(TRITON_MODULE)
    monkeypatch.setattr(compilers, "triton_modules", lambda: {"one_forgotten": module})
    monkeypatch.setattr(compilers, "triton_module", lambda stem: module)
    monkeypatch.setattr(compilers, "find_nvcc", lambda: None)
    monkeypatch.setattr(
        codegen, "compile_all", lambda jobs: sum(map(codegen.compile_files, jobs), [])
    )
    assert codegen.main(["--archs", "sm_80", "sm_90a"]) == 1
    shown = capsys.readouterr().out
    assert "forgotten_kernel (Triton): not in the table" in shown and "nvcc was not found" in shown
    assert shown.count("has no mma") == 2 and "shown_kernel (Triton): not" not in shown
    assert codegen.main(["--archs", "sm_80", "--kernel", "shown_kernel"]) == 1
    assert "not in the table" not in capsys.readouterr().out.replace(".cu files are not", "")
    jobs, _, _ = codegen.find_jobs(["sm_80"], ["shown_kernel"], ["sm_80", "sm_90a"])
    assert [(arch, scope) for _, arch, _, scope in jobs] == [
        ("sm_80", "all"),
        ("sm_90a", "headline"),
    ], "a headline takes nothing from what is compiled anyway"
    with pytest.raises(SystemExit):
        codegen.main(["--kernel", "no_kernel"])


@needs_nvcc
def test_a_cuda_file_and_its_comments(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bad.cu"
    path.write_text(CUDA_SOURCE)
    monkeypatch.setattr(compilers, "triton_modules", dict)
    monkeypatch.setattr(compilers, "cuda_files", lambda: [path])
    monkeypatch.setattr(
        codegen, "compile_all", lambda jobs: sum(map(codegen.compile_files, jobs), [])
    )
    out = tmp_path / "codegen.json"
    assert codegen.main(["--archs", "sm_80", "sm_90a", "--json", str(out)]) == 1
    assert "forgotten_kernel (CUDA): not in the table" in capsys.readouterr().out
    tables = json.loads(out.read_text())
    for row, arch in zip(tables["rows"], ("sm_80", "sm_90a"), strict=True):
        assert (row["arch"], row["threads"], row["registers"]) == (arch, 1024, 32)
        assert row["shared"] >= 4096 and row["spills"] > 0 and not row["counts"]["mma"]
    (row,) = tables["predictions"]
    assert (row["bytes"], row["flops"], row["shape"]) == (2.6e5, 4e3, "one block")


@needs_nvcc
def test_comments_may_mean_some_instantiations(tmp_path):
    path = tmp_path / "copies.cu"
    path.write_text(COPIES)
    narrow, wide = compilers.compile_cuda(compilers.find_nvcc(), path, "sm_90a")
    assert (wide.case, wide.problems()) == ("float4", [])
    assert (narrow.case, narrow.problems()) == ("float", ["has no load_16"])
    assert narrow.shared == wide.shared + 1000

"""mistral_kernels._C itself: it loads anywhere, shares torch's threads, and repeats its bits."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence

import oracle
import peer
import pytest
import torch
from emulator.guard_bands import GuardBands
from scene import rope_tables
from tolerance import assert_close, assert_same

from mistral_kernels import ops
from mistral_kernels.ops import dispatch
from mistral_kernels.ops.rms_norm import _rms_norm_native

_C = pytest.importorskip("mistral_kernels._C", reason="installed without a C++ compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
INSTRUCTION_SETS = _C.instruction_sets()

HAS_CUDA = hasattr(_C, "rms_norm_cuda")
needs_cuda_code = pytest.mark.skipif(not HAS_CUDA, reason="_C was built without CUDA: no nvcc")


def rms_norm_cpu(x, weight, residual=None, *, instruction_set=INSTRUCTION_SETS[-1]):
    """normed, and with a residual summed, by the C++ launcher."""
    queue = torch.get_num_threads(), INSTRUCTION_SETS.index(instruction_set)
    with GuardBands() as guard:
        inputs = guard(x), guard(residual), guard(weight)
        return _rms_norm_native(_C.rms_norm_cpu, *inputs, EPS, *queue)


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_it_loads_where_no_gpu_is_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run("import torch; from mistral_kernels import _C; print(_C.build_info())")
    assert result.returncode == 0, result.stderr
    assert "compiler" in result.stdout


def test_without_torch_the_missing_openmp_runtime_is_named():
    # The package imports torch; without it nothing in the process has OpenMP.
    code = f"import importlib.machinery as m; m.ExtensionFileLoader('_C', {_C.__file__!r})"
    result = run(f"{code}.create_module(m.ModuleSpec('_C', None, origin={_C.__file__!r}))")
    assert result.returncode != 0
    assert re.search("undefined symbol: (GOMP|omp)_", result.stderr)


def test_one_openmp_runtime_serves_torch_and_the_core():
    code = """
import torch
from mistral_kernels import _C
x = torch.randn(64, 512)
weight, out = torch.ones(512), torch.empty(64, 512)
_C.rms_norm_cpu(
    x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 0, 64, 512, 512, 0, 1e-5, 0, 2, 0
)
torch.mm(x, x.T)
maps = open("/proc/self/maps").read().split()
print(*sorted({path for path in maps if "libgomp" in path or "libomp" in path}), sep="\\n")
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 1, result.stdout


def test_build_info_says_what_was_built():
    info = _C.build_info()
    assert set(info) == {"compiler", "pybind11", "instruction_sets", "cuda", "cuda_archs"}
    assert info["instruction_sets"][0] == "portable"
    assert info["instruction_sets"][: len(INSTRUCTION_SETS)] == INSTRUCTION_SETS
    assert re.search(r"\d+\.\d+", info["compiler"])
    assert re.fullmatch(r"\d+\.\d+\..+", info["pybind11"])
    assert (info["cuda"] is None) == (info["cuda_archs"] is None) == (not HAS_CUDA)


@needs_cuda_code
def test_cuda_versions_need_no_driver():
    driver, runtime = _C.cuda_versions()
    major, minor = map(int, _C.build_info()["cuda"].split("."))
    assert runtime == 1000 * major + 10 * minor
    assert driver >= 0


@needs_cuda_code
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_cuda_launch_without_a_gpu_names_the_op():
    x = torch.ones(1, 8)
    with pytest.raises(RuntimeError, match="rms_norm: CUDA error: cudaError"):
        address = x.data_ptr()
        _C.rms_norm_cuda(address, 0, address, address, 0, 1, 8, 8, 0, EPS, 0, 0, 0)


def add_rms_norm_of_rows(dtype: torch.dtype) -> Callable[[], Sequence[torch.Tensor]]:
    x, residual = (torch.randn(137, 1000).to(dtype) for _ in range(2))
    weight = torch.randn(1000).to(dtype)
    return lambda: ops.add_rms_norm(x, residual, weight, EPS, backend="cpu")


def rope_of_heads(dtype: torch.dtype) -> Callable[[], Sequence[torch.Tensor]]:
    qkv = torch.randn(701, 6, 34).to(dtype)
    tables = rope_tables(34, dtype, "cpu")
    positions = torch.arange(701, dtype=torch.int32) % 41 - 1
    call = {**tables, "positions": positions, "interleaved": True, "backend": "cpu"}
    return lambda: ops.rope(qkv[:, :4], qkv[:, 4:5], **call)


def silu_mul_of_rows(dtype: torch.dtype) -> Callable[[], Sequence[torch.Tensor]]:
    gate_up = torch.randn(601, 2 * 133).to(dtype)
    return lambda: [ops.silu_mul(gate_up, backend="cpu")]


def routes(dtype: torch.dtype) -> Callable[[], Sequence[torch.Tensor]]:
    logits = torch.randn(2100, 9).to(dtype)
    return lambda: ops.route_experts(logits, 3, backend="cpu")


# Each is more than one thread's worth of work (kElementsAThread) for three.
@pytest.mark.parametrize("prepare", [add_rms_norm_of_rows, rope_of_heads, silu_mul_of_rows, routes])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, prepare, threads):
    call = prepare(dtype)
    threads(1)
    expected = call()
    for count in (2, 3):
        threads(count)
        for got, want in zip(call(), expected, strict=True):
            assert_same(got, want, f"{count} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 64, 1000])
def test_strided_rows(hidden, dtype):
    wide = torch.randn(5, 3 * hidden).to(dtype)
    x, residual = wide[:, hidden : 2 * hidden], wide[:, 2 * hidden :]
    weight = torch.randn(hidden).to(dtype)
    normed, summed = rms_norm_cpu(x, weight, residual)
    assert_same(summed, x + residual, "summed")
    exact = torch.from_numpy(oracle.rms_norm(oracle.f64(summed), oracle.f64(weight), EPS))
    assert_close(normed, peer.rms_norm(summed, weight, EPS), exact.view(x.shape), "normed")
    assert_same(rms_norm_cpu(x, weight), rms_norm_cpu(x.contiguous(), weight), "plain")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("hidden", [1, 2**16], ids=["alone", "in vectors"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_value_is_converted_as_torch_does(dtype, hidden, instruction_set):
    # summed = round(x + 0), for all 65536 bit patterns.
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, hidden)
    zero = torch.zeros_like(x)
    _, summed = rms_norm_cpu(x, zero[0], zero, instruction_set=instruction_set)
    assert torch.equal(summed.isnan(), x.isnan())
    finite = ~x.isnan()
    assert_same(summed[finite], (x + zero)[finite], "converted there and back")
    # Halfway cases: the sum of neighbours in magnitude rounds to even.
    step = torch.roll(x, 1)
    _, summed = rms_norm_cpu(x, zero[0], step, instruction_set=instruction_set)
    finite = ~(x + step).isnan()
    assert_same(summed[finite], (x + step)[finite], "rounded")


def test_instruction_sets_are_those_of_the_machine():
    assert INSTRUCTION_SETS[0] == "portable"
    order = ["portable", "avx2", "avx512", "avx512_bf16"]
    assert INSTRUCTION_SETS == order[: len(INSTRUCTION_SETS)]
    assert dispatch.instruction_set() == len(INSTRUCTION_SETS) - 1
    x = torch.ones(1, 8)
    with pytest.raises(IndexError):
        _rms_norm_native(_C.rms_norm_cpu, x, None, x[0], EPS, 1, len(INSTRUCTION_SETS))

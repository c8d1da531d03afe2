"""Rounding to int8 and fp8 and back in Triton, on every value that can be told apart."""

import pytest
import torch
import triton
import triton.language as tl
from tolerance import assert_same

from mistral_kernels.kernels.cache_elements import as_stored, expanded

pytestmark = pytest.mark.interpreter
# Every fp16 number: all halfway cases of e4m3, its subnormals, overflows, infinities and NaNs.
HALVES = torch.arange(-(2**15), 2**15).short().view(torch.float16).float()


@triton.jit
def store_kernel(x_ptr, out_ptr, scale, SIZE: tl.constexpr, CACHE_FORMAT: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, as_stored(tl.load(x_ptr + offs), scale, CACHE_FORMAT))


@triton.jit
def load_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, CACHE_FORMAT: tl.constexpr):
    offs = tl.arange(0, SIZE)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + offs, expanded(tl.load(x_ptr + offs), dtype, CACHE_FORMAT))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_fp8_is_stored_as_torch_rounds_it(scale):
    out = torch.empty(len(HALVES), dtype=torch.uint8)
    store_kernel[(1,)](HALVES, out, scale, SIZE=len(HALVES), CACHE_FORMAT="fp8")
    expected = (HALVES / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert_same(out, expected.view(torch.uint8), "bits")


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_int8_is_stored_as_torch_rounds_it(scale):
    values = torch.arange(-(2**15), 2**15) / 128  # halves of steps and what is beside them
    out = torch.empty(len(values), dtype=torch.int8)
    store_kernel[(1,)](values, out, scale, SIZE=len(values), CACHE_FORMAT="int8")
    expected = (values / torch.tensor(scale)).round().clamp(-128, 127).to(torch.int8)
    assert_same(out, expected, "stored")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_is_read_exactly(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256, dtype=dtype)
    load_kernel[(1,)](codes, out, SIZE=256, CACHE_FORMAT="fp8")
    expected = codes.view(torch.float8_e4m3fn).float()
    nan = expected.isnan()
    assert nan.sum() == 2 and out[nan].isnan().all()
    assert_same(out[~nan].float() * 256, expected[~nan], "fp8")
    load_kernel[(1,)](codes.view(torch.int8), out, SIZE=256, CACHE_FORMAT="int8")
    assert_same(out.float(), codes.view(torch.int8).float(), "int8")

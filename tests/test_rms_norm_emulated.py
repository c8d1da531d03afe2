"""The shipped csrc/cuda/rms_norm.cu on the host emulator."""

import oracle
import peer
import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from tolerance import assert_close, assert_same

from mistral_kernels.ops.rms_norm import _rms_norm_native

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def emulate(x, weight, residual=None, device=0):
    """normed, and with a residual summed; checks that nothing else was written."""
    launch = emulated_core().rms_norm_cuda
    with GuardBands() as guard:
        return _rms_norm_native(launch, guard(x), guard(residual), guard(weight), EPS, device, 0)


def check(normed, x, weight):
    exact = torch.from_numpy(oracle.rms_norm(oracle.f64(x), oracle.f64(weight), EPS))
    assert_close(normed, peer.rms_norm(x, weight, EPS), exact.view(x.shape), "rms_norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 64, 1000, 4096])
@pytest.mark.parametrize("tokens", [0, 3])
def test_rms_norm(tokens, hidden, dtype):
    x, weight = torch.randn(tokens, hidden).to(dtype), torch.randn(hidden).to(dtype)
    check(emulate(x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 64, 1000, 4096])
@pytest.mark.parametrize("tokens", [0, 3])
def test_add_rms_norm(tokens, hidden, dtype):
    x, residual = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
    weight = torch.randn(hidden).to(dtype)
    normed, summed = emulate(x, weight, residual)
    assert_same(summed, x + residual, "summed")
    check(normed, summed, weight)


@pytest.mark.parametrize("hidden", [7, 4096])
def test_any_order_of_threads(hidden, orders):
    test_rms_norm(3, hidden, torch.bfloat16)
    test_add_rms_norm(2, hidden, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_rows_give_the_bits_of_packed_ones(dtype):
    wide = torch.randn(3, 3 * 64 + 1).to(dtype)
    weight = torch.randn(65).to(dtype)
    # The stride and the second offset are odd, so rows start at every alignment.
    for x in (wide[:, :64], wide[:, 65:129]):
        for aligned_weight in (weight[:64], weight[1:]):
            packed = emulate(x.contiguous(), aligned_weight.clone(), x.contiguous())
            for got, want in zip(emulate(x, aligned_weight, x), packed, strict=True):
                assert_same(got, want, "strided")


def test_an_unknown_device_is_an_error_that_names_the_op():
    x = torch.randn(1, 8)
    with pytest.raises(RuntimeError, match="rms_norm: CUDA error: cudaErrorInvalidDevice"):
        emulate(x, torch.ones(8), device=1)

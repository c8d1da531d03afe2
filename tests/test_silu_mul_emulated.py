"""The shipped csrc/cuda/silu_mul.cu on the host emulator."""

import oracle
import peer
import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from test_silu_mul import SHAPES
from test_silu_mul_interpreted import DTYPES, guarded
from tolerance import assert_close, assert_rounded_once, assert_same

from mistral_kernels import ops
from mistral_kernels.ops.silu_mul import _silu_mul_native

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def emulate(gate_up, device=0):
    with GuardBands() as guard:
        return _silu_mul_native(emulated_core().silu_mul_cuda, guard(gate_up), device, 0)


def check(gate_up) -> None:
    exact = torch.from_numpy(oracle.silu_mul(oracle.f64(gate_up)))
    assert_close(emulate(gate_up), peer.silu_mul(gate_up), exact, "silu_mul")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(shape, dtype):
    check(torch.randn(shape).mul(3).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ffn_dim", [1, 3, 7, 8, 9, 15, 17, 512, 1023, 1024, 1032, 2049])
def test_rows_around_a_vector_and_a_block(ffn_dim, dtype):
    check(guarded(3, 2 * ffn_dim, dtype))  # columns from an odd one on: element by element
    check(torch.randn(3, 2 * ffn_dim).mul(3).to(dtype))


def test_any_order_of_threads(orders):
    test_rows_around_a_vector_and_a_block(2049, torch.bfloat16)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(half):
    gate_up = torch.randn(9, 1024).to(half)
    exact = torch.from_numpy(oracle.silu_mul(oracle.f64(gate_up)))
    assert_rounded_once(emulate(gate_up), exact, "silu_mul")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans_as_the_reference(dtype):
    inf = torch.inf
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 90.0, -90.0, 6e4, -6e4, inf, -inf, torch.nan])
    gate_up = torch.cartesian_prod(values, values).T.reshape(1, -1).to(dtype)
    expected = ops.silu_mul(gate_up, backend="reference")
    torch.testing.assert_close(emulate(gate_up), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_rows_give_the_bits_of_packed_ones(dtype):
    wide = torch.randn(4, 3, 80).to(dtype)
    # Whole vectors, an odd offset, an odd stride, and an outer stride below an inner one.
    odd = torch.randn(5, 81).to(dtype)[:, :32]
    for x in (wide[:, 1, 16:48], wide[..., 5:37], odd, wide[..., :32].transpose(0, 1)):
        assert_same(emulate(x), emulate(x.contiguous()), "silu_mul")


def test_an_unknown_device_is_an_error_that_names_the_op():
    with pytest.raises(RuntimeError, match="silu_mul: CUDA error: cudaErrorInvalidDevice"):
        emulate(torch.randn(1, 8), device=1)

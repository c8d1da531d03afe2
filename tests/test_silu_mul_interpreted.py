"""silu_mul's Triton kernels in Triton's interpreter, on rows around the edges of their tiles.

`test_silu_mul.py` runs the same backend there on the shapes that every backend gets.
"""

import functools

import gradients
import oracle
import peer
import pytest
import torch
from tolerance import assert_close, assert_same

from mistral_kernels import ops

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def tile_of_8(monkeypatch):
    from mistral_kernels.kernels import silu_mul as kernel

    monkeypatch.setattr(kernel, "tile_config", lambda *_: {"BLOCK_FFN": 8, "num_warps": 1})


def guarded(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random rows between columns and rows of NaN, where a wrong mask would read."""
    wide = torch.full((tokens + 2, columns + 2), torch.nan).to(dtype)
    rows = wide[1:-1, 1:-1]
    rows.copy_(torch.randn(tokens, columns).mul(3))
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ffn_dim", [1, 7, 8, 9, 15, 16, 17, 33])
def test_rows_around_a_tile(ffn_dim, dtype, tile_of_8):
    gate_up = guarded(3, 2 * ffn_dim, dtype)
    out = ops.silu_mul(gate_up, backend="triton")
    exact = torch.from_numpy(oracle.silu_mul(oracle.f64(gate_up)))
    assert_close(out, peer.silu_mul(gate_up), exact, "silu_mul")
    ours = functools.partial(ops.silu_mul, backend="triton")
    gradients.check_dtype(ours, peer.silu_mul, {"gate_up": gate_up}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_strided_rows(dtype, tile_of_8):
    gate_up = guarded(5, 20, dtype).requires_grad_()
    packed = gate_up.detach().clone().requires_grad_()
    # The gradient of a sum is one expanded number.
    ops.silu_mul(gate_up, backend="triton").sum().backward()
    ops.silu_mul(packed, backend="triton").sum().backward()
    assert_same(gate_up.grad, packed.grad, "gradient")
    assert gate_up.grad.isfinite().all()


def test_the_triton_cell_serves_the_backward(monkeypatch):
    from mistral_kernels.kernels import silu_mul as kernel

    calls = []
    monkeypatch.setattr(kernel, "silu_mul_backward", lambda *tensors: calls.append(tensors))
    gate_up = torch.randn(2, 8, requires_grad=True)
    ops.silu_mul(gate_up, backend="triton").sum().backward()
    assert len(calls) == 1


def test_tile_config():
    from mistral_kernels.kernels import silu_mul as kernel

    for ffn_dim in (1, 33, 1024, 1025, 14336):
        config = kernel.tile_config(ffn_dim, torch.bfloat16, (9, 0))
        assert config["BLOCK_FFN"] == min(1 << (ffn_dim - 1).bit_length(), 1024)
        assert config["num_warps"] in (1, 2, 4)

"""rms_norm's Triton kernel in Triton's interpreter, on rows around the edges of its tiles.

Run with TRITON_INTERPRET=1 set before the process starts: `TRITON_INTERPRET=1 pytest -m
interpreter`. `test_rms_norm.py` runs the same backend there on the shapes that every backend gets.
"""

import functools
import os

import gradients
import oracle
import peer
import pytest
import torch
from tolerance import assert_close, assert_same

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

pytestmark = pytest.mark.interpreter
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE_ROW = 16384  # longer rows are worked in pieces; by the backward those longer than 8192


def test_the_interpreter_is_on():
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before pytest starts"
    assert dispatch.unavailable("triton") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 31, 32, 33, 512, 2049, WHOLE_ROW + 3])
def test_rows_around_a_power_of_two(hidden, dtype):
    # Guard bands: a masked store that is off by one lands in the neighbouring rows or columns.
    wide = torch.full((5, hidden + 2), torch.nan).to(dtype)
    x = wide[1:4, 1:-1]
    x.copy_(torch.randn(3, hidden))
    weight = torch.randn(hidden).to(dtype)
    out = ops.rms_norm(x, weight, EPS, backend="triton")
    exact = torch.from_numpy(oracle.rms_norm(oracle.f64(x), oracle.f64(weight), EPS))
    assert_close(out, peer.rms_norm(x, weight, EPS), exact, "rms_norm")
    residual = torch.randn(3, hidden).to(dtype)
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS, backend="triton")
    assert_same(summed, x + residual, "summed")
    exact = torch.from_numpy(oracle.rms_norm(oracle.f64(summed), oracle.f64(weight), EPS))
    assert_close(normed, peer.rms_norm(summed, weight, EPS), exact, "normed")


def both_outputs(x, residual, weight):
    """One differentiable number for each element of both outputs of add_rms_norm."""
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS, backend="triton")
    return torch.cat((normed, summed))


def plain_outputs(x, residual, weight):
    summed = x + residual
    return torch.cat((peer.rms_norm(summed, weight, EPS), summed))


@pytest.fixture
def few_parts(monkeypatch):
    """Three programs share the rows, and their sums are added two at a time."""
    from mistral_kernels.kernels import rms_norm_backward, sum_parts

    monkeypatch.setattr(rms_norm_backward, "MAX_PARTS", 3)
    sums = {"BLOCK_PARTS": 2, "BLOCK_COLUMNS": 16, "num_warps": 1}
    monkeypatch.setattr(sum_parts, "CONFIG", sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden"), [(1, 1), (2, 31), (3, 32), (4, 33), (7, 16), (9, 17)], ids=str
)
def test_gradients_around_tiles_and_parts(tokens, hidden, dtype, few_parts):
    wide = torch.full((tokens + 2, 2, hidden + 2), torch.nan).to(dtype)
    rows = wide[1:-1, :, 1:-1]
    rows.copy_(torch.randn(rows.shape))
    inputs = {"x": rows[:, 0], "residual": rows[:, 1], "weight": torch.randn(hidden)}
    gradients.check_dtype(both_outputs, plain_outputs, inputs, dtype)
    del inputs["residual"]
    ours = functools.partial(ops.rms_norm, eps=EPS, backend="triton")
    gradients.check_dtype(ours, functools.partial(peer.rms_norm, eps=EPS), inputs, dtype)


def test_gradients_repeat_and_rows_do_not_depend_on_neighbours(few_parts):
    x, weight = torch.randn(11, 40), torch.randn(40)

    def gradient_of(rows):
        leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
        # A sum's gradient is one expanded number.
        ops.rms_norm(*leaves, EPS, backend="triton").sum().backward()
        return [leaf.grad for leaf in leaves]

    d_x, d_weight = gradient_of(x)
    for got, want in zip(gradient_of(x), (d_x, d_weight), strict=True):
        assert_same(got, want, "again")
    assert_same(gradient_of(x[4:5])[0], d_x[4:5], "one row")


def test_no_tokens_give_a_zero_gradient_of_the_weight():
    x, weight = torch.randn(0, 8), torch.ones(8, requires_grad=True)
    ops.rms_norm(x, weight, EPS, backend="triton").sum().backward()
    assert_same(weight.grad, torch.zeros(8), "gradient of weight")


def test_gradients_of_rows_in_pieces(few_parts, monkeypatch):
    from mistral_kernels.kernels import rms_norm_backward as kernel

    x, residual, weight = torch.randn(4, 8195), torch.randn(4, 8195), torch.randn(8195)
    inputs = {"x": x, "residual": residual, "weight": weight}
    gradients.check_float32(both_outputs, plain_outputs, inputs)
    monkeypatch.setattr(kernel, "WHOLE_ROW", 15)
    monkeypatch.setattr(kernel, "PIECE", 16)
    for hidden in (16, 17, 33):
        inputs = {"x": x[:, :hidden], "residual": residual[:, :hidden], "weight": weight[:hidden]}
        for dtype in DTYPES:
            gradients.check_dtype(both_outputs, plain_outputs, inputs, dtype)


def test_backward_tile_config_fetches_ahead_where_it_fits():
    from mistral_kernels.kernels import rms_norm_backward as kernel

    for hidden in (1, 33, 4096, kernel.WHOLE_ROW, kernel.WHOLE_ROW + 1, 2**20):
        for dtype in DTYPES:
            for has_residual in (False, True):
                config = kernel.tile_config(hidden, has_residual, dtype, (8, 0))
                block = config["BLOCK_HIDDEN"]
                assert block < 2 * hidden and config["num_warps"] in (1, 2, 4, 8, 16, 32)
                assert block == kernel.PIECE if hidden > kernel.WHOLE_ROW else block >= hidden
                ahead = (config["STAGES"] - 1) * (4 if has_residual else 2) * block * dtype.itemsize
                assert ahead <= 64 * 1024
    assert kernel.tile_config(4096, True, torch.bfloat16, (8, 0))["STAGES"] == 2


def test_tile_config_covers_a_row_or_a_piece():
    from mistral_kernels.kernels import rms_norm as kernel

    assert kernel.WHOLE_ROW == WHOLE_ROW
    for hidden in (1, 33, 4096, 5000, WHOLE_ROW, WHOLE_ROW + 1, 2**20):
        config = kernel.tile_config(hidden, torch.bfloat16, (9, 0))
        block = config["BLOCK_HIDDEN"]
        assert block < 2 * hidden and block & (block - 1) == 0
        assert block == kernel.PIECE if hidden > WHOLE_ROW else block >= hidden
        assert config["num_warps"] in (1, 2, 4, 8, 16)

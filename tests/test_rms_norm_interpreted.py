"""rms_norm's Triton kernel in Triton's interpreter, on rows around the edges of its tiles.

Run with TRITON_INTERPRET=1 set before the process starts: `TRITON_INTERPRET=1 pytest -m
interpreter`. `test_rms_norm.py` runs the same backend there on the shapes that every backend gets.
"""

import os

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


def test_the_interpreter_is_on():
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before pytest starts"
    assert dispatch.unavailable("triton") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 31, 32, 33, 511, 512, 513, 1024, 2049])
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


def test_tile_config_covers_a_row_or_refuses():
    from mistral_kernels.kernels import rms_norm as kernel

    for hidden in (1, 33, 4096, 5000, kernel.MAX_HIDDEN):
        config = kernel.tile_config(hidden, torch.bfloat16, (9, 0))
        block = config["BLOCK_HIDDEN"]
        assert hidden <= block < 2 * hidden and block & (block - 1) == 0
        assert config["num_warps"] in (1, 2, 4, 8, 16)
    with pytest.raises(ValueError, match=f"rms_norm: .*{kernel.MAX_HIDDEN}.*{2**20}"):
        kernel.tile_config(2**20, torch.bfloat16, (9, 0))

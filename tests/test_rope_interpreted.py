"""rope's Triton kernel in Triton's interpreter, on heads around the edges of its tiles.

`test_rope.py` runs the same backend there on the shapes that every backend gets.
"""

import functools

import gradients
import oracle
import peer
import pytest
import torch
from scene import rope_tables
from tolerance import assert_close, assert_same

from mistral_kernels import ops

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = [5, -1, 39]
LAYOUTS = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])


@pytest.fixture
def two_heads_a_program(monkeypatch):
    from mistral_kernels.kernels import rope as kernel

    def tile_config(q_heads, kv_heads, head_dim, *_):
        block_pairs = 1 << (head_dim // 2 - 1).bit_length()
        return {"BLOCK_HEADS": 2, "BLOCK_PAIRS": block_pairs, "num_warps": 1}

    monkeypatch.setattr(kernel, "tile_config", tile_config)


def guarded_call(q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict:
    """Return a call on views of one qkv tensor whose other heads and columns are NaN."""
    heads = q_heads + kv_heads
    wide = torch.full((len(POSITIONS), heads + 2, head_dim + 8), torch.nan).to(dtype)
    rows = wide[:, 1:-1, :head_dim]
    rows.copy_(torch.randn(rows.shape))
    tables = rope_tables(head_dim, dtype, "cpu")
    for name in ("cos", "sin"):  # rows of one wider table
        tables[name] = torch.nn.functional.pad(tables[name], (0, 4), value=torch.nan)
        tables[name] = tables[name][:, : head_dim // 2]
    positions = torch.tensor(POSITIONS, dtype=torch.int32)
    return {"q": rows[:, :q_heads], "k": rows[:, q_heads:], "positions": positions, **tables}


def oracle_of(call: dict, name: str, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact result for q or k, and torch's."""
    q_scale = call["q_scale"] if name == "q" else None
    exact = oracle.rope(
        oracle.f64(call[name]), oracle.f64(call["cos"]), oracle.f64(call["sin"]), POSITIONS,
        interleaved=interleaved, q_scale=None if q_scale is None else oracle.f64(q_scale),
    )  # fmt: skip
    plain = peer.rope(
        call[name], call["cos"], call["sin"], call["positions"],
        interleaved=interleaved, q_scale=q_scale,
    )  # fmt: skip
    return torch.from_numpy(exact), plain


@LAYOUTS
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (5, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [6, 96])
def test_heads_around_a_tile(head_dim, heads, interleaved, two_heads_a_program):
    call = guarded_call(*heads, head_dim, torch.float32)
    rotated = ops.rope(**call, interleaved=interleaved, backend="triton")
    for name, got in zip("qk", rotated, strict=True):
        exact, plain = oracle_of(call, name, interleaved)
        assert_close(got, plain, exact, name)
    before = call["q"]._base.clone()
    ops.rope_(**call, interleaved=interleaved, backend="triton")
    assert_same(torch.cat((call["q"], call["k"]), 1), torch.cat(rotated, 1), "in place")
    after = call["q"]._base.clone()
    after[:, 1:-1, :head_dim] = before[:, 1:-1, :head_dim]
    assert_same(after, before, "beside q and k")


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_every_head_dim(head_dim, dtype, interleaved):
    call = guarded_call(2, 1, head_dim, dtype)
    rotated = ops.rope(**call, interleaved=interleaved, backend="triton")
    for name, got in zip("qk", rotated, strict=True):
        assert_close(got, *reversed(oracle_of(call, name, interleaved)), name)
        assert_same(got[1], call[name][1], f"idle row of {name}")


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, interleaved, two_heads_a_program):
    call = guarded_call(3, 1, 6, dtype)
    inputs = {"q": call.pop("q"), "k": call.pop("k")}

    def ours(q, k):
        return torch.cat(ops.rope(q, k, **call, interleaved=interleaved, backend="triton"), 1)

    def plain(q, k):
        named = {name: call[name] for name in ("cos", "sin", "positions")}
        turn = functools.partial(peer.rope, **named, interleaved=interleaved)
        return torch.cat((turn(q, q_scale=call["q_scale"]), turn(k)), 1)

    gradients.check_dtype(ours, plain, inputs, dtype)


def test_the_triton_cell_serves_the_backward(monkeypatch):
    from mistral_kernels.kernels import rope as kernel

    calls = []
    launch = kernel.rope
    monkeypatch.setattr(kernel, "rope", lambda *a, **how: (calls.append(how), launch(*a, **how)))
    call = guarded_call(1, 1, 6, torch.float32)
    q, k = call.pop("q").detach().requires_grad_(), call.pop("k")
    turned, _ = ops.rope(q, k, **call, interleaved=True, backend="triton")
    turned.sum().backward()
    assert [how.get("inverse", False) for how in calls] == [False, True]


def test_tile_config():
    from mistral_kernels.kernels import rope as kernel

    for heads in ((1, 1), (32, 8), (48, 8), (7, 1)):
        for head_dim in (2, 6, 80, 128, 256, 4096):
            config = kernel.tile_config(*heads, head_dim, torch.bfloat16, (9, 0))
            pairs, block = config["BLOCK_PAIRS"], config["BLOCK_HEADS"]
            assert head_dim // 2 <= pairs < head_dim or pairs == 1
            assert block * pairs <= max(512, pairs) and block < 2 * max(heads)
            assert config["num_warps"] in (1, 2, 4, 8, 16)

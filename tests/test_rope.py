"""rope and rope_ against a float64 loop over complex pairs, on every backend."""

import functools

import gradients
import oracle
import peer
import pytest
import refusal
import registration
import shapes
import torch
from scene import SMALL, rope_tables
from tolerance import assert_close, assert_same
from whole_graph import whole_graph

from mistral_kernels import ops

OP = "rope"
POSITIONS = [3, -1, 0, 39, 17, 17, -5]
# Fewer pairs than a vector has lanes, and pairs left over behind whole vectors.
TAILS = [shapes.Heads(2, 1, head_dim) for head_dim in (2, 6, 22, 34, 80)]


def valid_call(dtype=torch.float32, device="cpu", heads=SMALL) -> dict:
    """Return q, k as views of one qkv tensor, and the tables, as keyword arguments."""
    tokens, (q_heads, kv_heads, head_dim) = len(POSITIONS), heads
    qkv = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    return {
        "q": qkv[:, :q_heads],
        "k": qkv[:, q_heads : q_heads + kv_heads],
        "positions": torch.tensor(POSITIONS, dtype=torch.int32, device=device),
        **rope_tables(head_dim, dtype, device),
        "interleaved": True,
    }


VALID = valid_call()


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "q_scale"])
@pytest.mark.parametrize("heads", [*shapes.HEADS, *TAILS], ids=str)
def test_rope(heads, scaled, interleaved, dtype, backend, device):
    call = {**valid_call(dtype, device, heads), "interleaved": interleaved}
    if not scaled:
        call["q_scale"] = None
    rotated = ops.rope(**call, backend=backend)
    cos, sin = oracle.f64(call["cos"]), oracle.f64(call["sin"])
    for name, got, q_scale in zip("qk", rotated, (call["q_scale"], None), strict=True):
        turn = functools.partial(oracle.rope, interleaved=interleaved)
        exact = turn(
            oracle.f64(call[name]), cos, sin, POSITIONS,
            q_scale=None if q_scale is None else oracle.f64(q_scale),
        )  # fmt: skip
        plain = peer.rope(
            call[name], call["cos"], call["sin"], call["positions"],
            interleaved=interleaved, q_scale=q_scale,
        )  # fmt: skip
        assert got.dtype == dtype and got.is_contiguous()
        assert_close(got, plain, torch.from_numpy(exact), name)
        idle = [row for row, position in enumerate(POSITIONS) if position < 0]
        assert_same(got[idle], call[name][idle], f"idle rows of {name}")


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
def test_in_place_equals_out_of_place(interleaved, dtype, backend, device):
    call = {**valid_call(dtype, device), "interleaved": interleaved}
    qkv, before = call["q"]._base, call["q"]._base.clone()
    expected_q, expected_k = ops.rope(**call, backend=backend)
    assert_same(qkv, before, "inputs of rope")
    q, k = ops.rope_(**call, backend=backend)
    assert q is call["q"] and k is call["k"]
    assert_same(qkv, torch.cat((expected_q, expected_k, before[:, 6:]), 1), "qkv")


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("heads", TAILS, ids=str)
def test_in_place_writes_nothing_beside_its_rows(heads, interleaved, dtype, backend, device):
    call = {**valid_call(dtype, device, heads), "interleaved": interleaved}
    expected = ops.rope(**call, backend=backend)
    # Each row gets a gap of 5 elements behind it, and a head that is neither q nor k.
    wide = torch.full((len(POSITIONS), 4, heads.head_dim + 5), 7.0, dtype=dtype, device=device)
    rows = wide[..., : heads.head_dim]
    q, k = rows[:, :2], rows[:, 2:3]
    q.copy_(call["q"])
    k.copy_(call["k"])
    ops.rope_(**{**call, "q": q, "k": k}, backend=backend)
    for name, got, want in zip("qk", (q, k), expected, strict=True):
        assert_same(got, want, name)
    assert (wide[:, :3, heads.head_dim :] == 7).all() and (wide[:, 3] == 7).all()


def test_many_positions_are_checked_too(backend, device):
    tokens = 100
    q, k = torch.randn(tokens, 2, 16, device=device), torch.randn(tokens, 1, 16, device=device)
    positions = torch.zeros(tokens, dtype=torch.int32, device=device)
    positions[71] = 40
    if device == "cpu":  # on a GPU the check would wait for the device
        with pytest.raises(ValueError, match="rope: positions must be < 40 .* got 40"):
            ops.rope(
                q, k, **rope_tables(16, torch.float32, device),
                positions=positions, interleaved=True, backend=backend,
            )  # fmt: skip


def test_no_tokens(backend, device):
    call = valid_call(device=device)
    empty = {name: call[name][:0] for name in ("q", "k", "positions")}
    for op in (ops.rope, ops.rope_):
        q, k = op(**{**call, **empty}, backend=backend)
        assert q.shape == (0, 4, 16) and k.shape == (0, 2, 16)


def summed_outputs(function):
    """Make a function of q and k alone that returns one tensor in which both outputs count."""
    return lambda q, k: torch.cat(function(q, k), 1)


def ours(call: dict, backend: str):
    """rope of q and k alone, its tables following their dtype as the op demands."""

    def rotate(q, k):
        rest = {name: value for name, value in call.items() if name not in "qk"}
        named = {name: rest[name].to(q.dtype) for name in ("cos", "sin", "q_scale")}
        return ops.rope(q, k, **{**rest, **named}, backend=backend)

    return summed_outputs(rotate)


def plain(call: dict):
    def rotate(q, k):
        turn = functools.partial(
            peer.rope,
            cos=call["cos"],
            sin=call["sin"],
            positions=call["positions"],
            interleaved=call["interleaved"],
        )
        return turn(q, q_scale=call["q_scale"]), turn(k)

    return summed_outputs(rotate)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
def test_gradients_on_the_reference(interleaved):
    call = {**valid_call(heads=shapes.Heads(2, 1, 4)), "interleaved": interleaved}
    inputs = {name: call[name] for name in "qk"}
    gradients.check(ours(call, "reference"), plain(call), inputs)


def test_gradients(backend, device):
    call = valid_call(device=device)
    inputs = {name: call[name] for name in "qk"}
    gradients.check_float32(ours(call, backend), plain(call), inputs)
    gradients.check_compiled(ours(call, backend), inputs)


@pytest.mark.parametrize("argument", ["q", "k", "cos", "sin", "q_scale"])
def test_in_place_refuses_grad(argument):
    refusal.check_refuses_grad(ops.rope_, VALID, argument)


@pytest.mark.parametrize("argument", ["cos", "sin", "q_scale"])
def test_tables_get_no_silent_zero_gradient(argument):
    refusal.check_refuses_grad(ops.rope, VALID, argument)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_registration(layout, backend, device):
    call = valid_call(device=device)
    q, k = (shapes.laid_out(call[name], layout) for name in "qk")
    rest = [call[name] for name in ("cos", "sin", "positions", "interleaved", "q_scale")]
    registration.check("rope_", q.clone(), k.clone(), *rest, backend)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    registration.check("rope", q, k, *rest, backend)
    registration.check("rope", q, k, *rest[:-1], None, backend)


def test_compiled_in_place(backend, device):
    call = valid_call(device=device)
    q, k = call.pop("q").clone(), call.pop("k").clone()
    rotate = functools.partial(ops.rope_, **call, backend=backend)
    expected = rotate(q.clone(), k.clone())
    got = whole_graph(rotate)(q, k)
    for name, left, right, given in zip("qk", got, expected, (q, k), strict=True):
        assert_same(left, right, name)
        assert_same(given, right, f"{name} in place")


REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("k", torch.ones(7, 2, 8), "head_dim=16", "(7, 2, 8)"),
    refusal.Case("k", torch.ones(6, 2, 16), "tokens=7", "(6, 2, 16)"),
    refusal.Case("k", torch.ones(7, 2, 16).half(), "torch.float32", "torch.float16"),
    refusal.Case("cos", torch.ones(40, 9), "16", "18"),
    refusal.Case("sin", torch.ones(39, 8), "40", "(39, 8)"),
    refusal.Case("cos", torch.ones(40, 8).double(), "torch.float32", "torch.float64"),
    refusal.Case("q_scale", torch.ones(39), "40", "(39,)"),
    refusal.Case("positions", torch.zeros(6, dtype=torch.int32), "tokens=7", "(6,)"),
    refusal.Case("positions", torch.full((7,), 40, dtype=torch.int32), "40", "got 40"),
]


@pytest.mark.parametrize("op", [ops.rope, ops.rope_], ids=["rope", "rope_"])
@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(op, case):
    refusal.check(op, VALID, case)

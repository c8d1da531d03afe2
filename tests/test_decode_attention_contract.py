"""decode_attention: its registration with torch, and the input it refuses."""

import functools

import pytest
import refusal
import registration
import ring
import shapes
import torch
from scene import make_step, rope_tables
from shapes import Chunk
from tolerance import assert_same
from whole_graph import whole_graph

from mistral_kernels import ops

OP = "decode_attention"
PAIR = Chunk("pair", (14, 3), (1, 1), 8, 4, 2)
SCALE = torch.ones(1)
SCHEMA = (
    "q k v k_cache v_cache block_table positions cos sin interleaved window starts q_scale scale"
    " k_scale v_scale workspace batch_invariant"
).split()


def valid_call(quantised: bool = False, device: str = "cpu", layout: str = "head-major") -> dict:
    """Return a call that rotates, on a cache of q's dtype or of int8."""
    kind = {"device": device, "layout": layout}
    if quantised:
        scale = SCALE.to(device)
        kind |= {"cache_dtype": torch.int8, "k_scale": scale, "v_scale": scale}
    scene = make_step(PAIR, **kind)
    return {
        **dict(zip("qkv", scene.parts(), strict=True)),
        **scene.ring.arguments(),
        "positions": scene.int32(PAIR.context_lens),
        **rope_tables(16, torch.float32, device),
        "interleaved": True,
        "window": 8,
        "starts": scene.int32((0, 0)),
        "scale": 0.25,
        "workspace": torch.zeros(1 << 20, dtype=torch.uint8, device=device),
        "batch_invariant": False,
    }


@pytest.mark.parametrize(
    ("layout", "quantised", "page_layout"),
    [
        (layout, layout == "padded", ring.PAGE_LAYOUTS[i % 2])
        for i, layout in enumerate(shapes.LAYOUTS)
    ],
)
def test_registration(layout, quantised, page_layout, backend, device):
    call = dict.fromkeys(SCHEMA) | valid_call(quantised, device, page_layout)
    call |= {name: shapes.laid_out(call[name], layout) for name in "qkv"}
    registration.check("decode_attention", *(call[name] for name in SCHEMA), backend)


def test_registration_without_optional_arguments(backend, device):
    rotates = dict.fromkeys(("cos", "sin", "q_scale", "starts", "window", "workspace"))
    for absent in (rotates, {**rotates, "k": None, "v": None, "positions": None}):
        call = dict.fromkeys(SCHEMA) | valid_call(device=device) | absent
        if call["positions"] is None:  # the newest that is written already
            call["positions"] = torch.tensor((13, 2), dtype=torch.int32, device=device)
        registration.check("decode_attention", *(call[name] for name in SCHEMA), backend)


def test_compiled(backend, device):
    run = functools.partial(ops.decode_attention, backend=backend)
    call = valid_call(device=device)
    eager = {name: value.clone() if "cache" in name else value for name, value in call.items()}
    compiled = whole_graph(run)
    for name, got, want in zip(("out", "lse"), compiled(**call), run(**eager), strict=True):
        assert_same(got, want, name)
    for name in ("k_cache", "v_cache"):
        assert_same(call[name], eager[name], name)


VALID, VALID_INT8 = valid_call(), valid_call(quantised=True)


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("q", torch.ones(2, 3, 16), "kv_heads 2", "q_heads 3"),
    refusal.Case("q", torch.ones(2, 0, 16), "positive multiple", "q_heads 0"),
    refusal.Case("k", None, "together", "no k"),
    refusal.Case("k", torch.ones(2, 2, 8), "head_dim=16", "(2, 2, 8)"),
    refusal.Case("v", torch.ones(3, 2, 16), "batch=2", "(3, 2, 16)"),
    refusal.Case("v", torch.ones(2, 2, 16).half(), "torch.float32", "torch.float16"),
    refusal.Case("k_cache", torch.ones(6, 4, 2, 8), "head_dim=16", "(6, 4, 2, 8)"),
    refusal.Case("k_cache", torch.ones(6, 4, 2, 16).half(), "torch.float32", "torch.float16"),
    refusal.Case("v_cache", torch.ones(5, 4, 2, 16), "pages=6", "(5, 4, 2, 16)"),
    refusal.Case("block_table", torch.full((2, 2), 6, dtype=torch.int32), "6", "got 6"),
    refusal.Case("block_table", torch.full((2, 2), -1, dtype=torch.int32), "0", "-1"),
    refusal.Case("block_table", torch.zeros(3, 2, dtype=torch.int32), "batch=2", "(3, 2)"),
    refusal.Case("positions", int32(1, 2, 3), "batch=2", "(3,)"),
    refusal.Case("positions", int32(1, 40), "40", "got 40"),
    refusal.Case("cos", None, "together", "no cos"),
    refusal.Case("cos", torch.ones(40, 8).half(), "torch.float32", "torch.float16"),
    refusal.Case("sin", torch.ones(39, 8), "40", "(39, 8)"),
    refusal.Case("q_scale", torch.ones(39), "40", "(39,)"),
    refusal.Case("window", -3, "1", "-3"),
    refusal.Case("starts", int32(0), "batch=2", "(1,)"),
    refusal.Case("scale", -torch.inf, "finite", "inf"),
    refusal.Case("k_scale", SCALE, "None", "tensor"),
]
REFUSED_INT8 = [
    *(case for case in refusal.cases(VALID_INT8) if case.argument in ("k_scale", "v_scale")),
    refusal.Case("k_scale", None, "(kv_heads,)", "None"),
    refusal.Case("v_scale", torch.ones(3), "kv_heads=2", "(3,)"),
]


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.decode_attention, VALID, case)


@pytest.mark.parametrize("case", REFUSED_INT8, ids=refusal.case_id)
def test_refuses_with_a_quantised_cache(case):
    refusal.check(ops.decode_attention, VALID_INT8, case)


def test_refuses_q_scale_without_a_rotation():
    call = {**VALID, "cos": None, "sin": None}
    case = refusal.Case("q_scale", VALID["q_scale"], "cos", "tensor")
    refusal.check(ops.decode_attention, call, case)


@pytest.mark.parametrize("argument", ["q", "k", "v", "k_cache", "v_cache", "cos", "sin", "q_scale"])
def test_refuses_grad(argument):
    refusal.check_refuses_grad(ops.decode_attention, VALID, argument)

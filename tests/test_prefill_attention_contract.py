"""prefill_attention: its gradients, its registration with torch, and the input it refuses."""

import functools

import gradients
import peer
import pytest
import refusal
import registration
import shapes
import torch
from scene import make_scene
from shapes import Chunk
from tolerance import assert_same
from whole_graph import whole_graph

from mistral_kernels import ops

OP = "prefill_attention"
WRAPS = Chunk("wraps", (6, 14), (3, 4), 8, 4, 2)


def attend(attention, offsets: list[int], **how):
    """Make a function of q, k, v alone."""

    def run(q, k, v):
        return attention(q, k, v, torch.tensor(offsets, dtype=torch.int32, device=q.device), **how)

    return run


def out_alone(run):
    """Leave the LSE out: it stays float32, too coarse for finite differences."""
    return lambda q, k, v: run(q, k, v)[0]


def both_outputs(run):
    """Make a function of q, k, v that returns one tensor in which out and lse both count."""

    def mixed(q, k, v):
        out, lse = run(q, k, v)
        return out * lse[..., None].to(out.dtype).sigmoid()

    return mixed


def plain_packed(q, k, v, cu_seqlens, **how):
    """peer.attention of each packed sequence."""
    outs = []
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        positions = list(range(end - begin))
        parts = (part[begin:end] for part in (q, k, v))
        outs.append(peer.attention(*parts, positions, positions, **how))
    return tuple(map(torch.cat, zip(*outs, strict=True)))


MASKS = [{"window": 3}, {"window": None}, {"causal": False}, {"scale": 0.9}]


def qkv_inputs(tokens: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    shape = {"q": (tokens, 4, 4), "k": (tokens, 2, 4), "v": (tokens, 2, 4)}
    return {name: torch.randn(size, device=device) for name, size in shape.items()}


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_gradients_on_the_reference(mask):
    ours = functools.partial(ops.prefill_attention, backend="reference")
    both = (attend(attention, [0, 5, 5, 6], **mask) for attention in (ours, plain_packed))
    gradients.check(*map(out_alone, both), qkv_inputs(6))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_gradients(mask, backend, device):
    ours = functools.partial(ops.prefill_attention, backend=backend)
    both = (attend(attention, [0, 9, 9, 14], **mask) for attention in (ours, plain_packed))
    run, plain = map(both_outputs, both)
    gradients.check_float32(run, plain, qkv_inputs(14, device))
    gradients.check_compiled(run, qkv_inputs(14, device))


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_refuses_grad_with_a_cache(argument):
    refusal.check_refuses_grad(ops.prefill_attention, VALID, argument)


@pytest.mark.parametrize("argument", ["k_cache", "v_cache", "k_scale", "v_scale"])
def test_refuses_grad_of_the_cache(argument):
    refusal.check_refuses_grad(
        ops.prefill_attention, VALID_INT8 if "scale" in argument else VALID, argument
    )


SCHEMA = (
    "q k v cu_seqlens k_cache v_cache block_table context_lens starts window causal scale k_scale"
    " v_scale batch_invariant"
).split()


@pytest.mark.parametrize(
    ("cache_dtype", "layout"),
    zip((torch.int8, torch.float32, None), shapes.LAYOUTS, strict=True),
    ids=str,
)
def test_registration(cache_dtype, layout, backend, device):
    defaults = dict.fromkeys(SCHEMA) | {"causal": True, "scale": 0.25, "batch_invariant": False}
    call = defaults | valid_call(cache_dtype, device)
    for name in "qkv":
        call[name] = shapes.laid_out(call[name], layout).detach()
        call[name].requires_grad_(cache_dtype is None)
    registration.check("prefill_attention", *(call[name] for name in SCHEMA), backend)


def test_registration_without_new_keys(backend, device):
    call = valid_call(torch.float32, device) | {"k": None, "v": None}
    call = dict.fromkeys(SCHEMA) | {"causal": True, "scale": 0.25, "batch_invariant": True} | call
    # All twelve keys have to be in the ring already.
    call["context_lens"] = torch.zeros_like(call["context_lens"])
    registration.check("prefill_attention", *(call[name] for name in SCHEMA), backend)


def test_compiled_with_a_cache(backend, device):
    call = valid_call(torch.float32, device)
    run = functools.partial(ops.prefill_attention, backend=backend)
    compiled = whole_graph(run)
    for name, got, want in zip(("out", "lse"), compiled(**call), run(**call), strict=True):
        assert_same(got, want, name)


def valid_call(cache_dtype: torch.dtype | None, device: str = "cpu") -> dict:
    """Return a call without a cache (None), or with one of q's dtype or of int8."""
    kind = {}
    if cache_dtype == torch.int8:
        kind = {"cache_dtype": torch.int8, "k_scale": SCALE.to(device), "v_scale": SCALE.to(device)}
    scene = make_scene(WRAPS, device=device, **kind)
    call = dict(zip("qkv", scene.parts(), strict=True))
    if cache_dtype is None:
        return {**call, "cu_seqlens": scene.int32(scene.offsets)}
    return {**call, **scene.packing(), **scene.ring.arguments(), "window": 8}


SCALE = torch.ones(1)
ALONE = {**valid_call(None), "causal": True, "scale": 0.25, "batch_invariant": False}
VALID = {**valid_call(torch.float32), "starts": torch.zeros(2, dtype=torch.int32)}
VALID_INT8 = valid_call(torch.int8)


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


REFUSED_ALONE = [
    *refusal.cases(ALONE),
    refusal.Case("q", torch.ones(7, 3, 16), "kv_heads 2", "q_heads 3"),
    refusal.Case("q", torch.ones(7, 0, 16), "positive multiple", "q_heads 0"),
    refusal.Case("q", torch.ones(7, 1, 16), "kv_heads 2", "q_heads 1"),
    refusal.Case("k", None, "together", "k"),
    refusal.Case("k", torch.ones(7, 2, 8), "head_dim=16", "(7, 2, 8)"),
    refusal.Case("v", torch.ones(6, 2, 16), "tokens=7", "(6, 2, 16)"),
    refusal.Case("v", torch.ones(7, 2, 16).half(), "torch.float32", "torch.float16"),
    refusal.Case("cu_seqlens", int32(0, 3, 6), "tokens=7", "[0, 3, 6]"),
    refusal.Case("cu_seqlens", int32(1, 7), "0", "[1, 7]"),
    refusal.Case("cu_seqlens", int32(0, 5, 3, 7), "rise", "[0, 5, 3, 7]"),
    refusal.Case("window", 0, "1", "0"),
    refusal.Case("window", -1, "1", "-1"),
    refusal.Case("window", 2.0, "int", "float"),
    refusal.Case("window", True, "int", "bool"),
    refusal.Case("k_scale", SCALE, "None", "tensor"),
    refusal.Case("k_cache", VALID["k_cache"], "together", "v_cache"),
    refusal.Case("context_lens", int32(0, 0), "together", "k_cache"),
    refusal.Case("starts", int32(0, 0, 0), "2", "(3,)"),
]
REFUSED = [
    *(case for case in refusal.cases(VALID) if case.argument not in ALONE),
    refusal.Case("cu_seqlens", int32(0, 3, 5, 7), "3", "4"),
    refusal.Case("causal", False, "True", "False"),
    refusal.Case("k_cache", torch.ones(6, 4, 2, 8), "head_dim=16", "(6, 4, 2, 8)"),
    refusal.Case("k_cache", VALID["k_cache"].half(), "torch.float32", "torch.float16"),
    refusal.Case("v_cache", torch.ones(5, 4, 2, 16), "pages=6", "(5, 4, 2, 16)"),
    refusal.Case("block_table", torch.full((2, 2), 6, dtype=torch.int32), "6", "got 6"),
    refusal.Case("block_table", torch.full((2, 2), -1, dtype=torch.int32), "0", "-1"),
    refusal.Case("context_lens", int32(-1, 3), "0", "-1"),
    refusal.Case("context_lens", int32(1, 2, 3), "batch=2", "(3,)"),
    refusal.Case("k_scale", SCALE, "None", "tensor"),
]
REFUSED_INT8 = [
    *(case for case in refusal.cases(VALID_INT8) if case.argument.endswith("scale")),
    refusal.Case("k_scale", None, "(kv_heads,)", "None"),
    refusal.Case("v_scale", torch.ones(3), "kv_heads=2", "(3,)"),
]


@pytest.mark.parametrize("case", REFUSED_ALONE, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.prefill_attention, ALONE, case)


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses_with_a_cache(case):
    refusal.check(ops.prefill_attention, VALID, case)


@pytest.mark.parametrize("case", REFUSED_INT8, ids=refusal.case_id)
def test_refuses_with_a_quantised_cache(case):
    refusal.check(ops.prefill_attention, VALID_INT8, case)


@pytest.mark.parametrize("window", [4, None])
def test_refuses_stored_chunks_without_the_lookahead(window):
    ring = {"k_cache": torch.zeros(3, 2, 2, 8), "v_cache": torch.zeros(3, 2, 2, 8)}
    ring["block_table"] = torch.tensor([[0, 1, 2]], dtype=torch.int32)  # 6 slots

    def call(tokens: int, context: int):
        lens = torch.tensor([context], dtype=torch.int32)
        offsets = torch.tensor([0, tokens], dtype=torch.int32)
        q = torch.zeros(tokens, 2, 8)
        return ops.prefill_attention(
            q, None, None, offsets, **ring, context_lens=lens, window=window
        )

    call(3, 7 if window else 3)  # 4 + 3 - 1 slots, or all 6 positions: enough
    with pytest.raises(ValueError, match="the ring keep a lookahead of 3 tokens, for sequence 0"):
        call(4, 7 if window else 3)


def test_refuses_mask_free_attention_with_a_window():
    call = {**ALONE, "causal": False}
    refusal.check(ops.prefill_attention, call, refusal.Case("window", 3, "causal", "False"))

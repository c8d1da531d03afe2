"""One more token compiles no Triton kernel anew: what a launch compiles for, read without a GPU."""

import os
from collections import defaultdict

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from mistral_kernels.ops import dispatch
from mistral_kernels.ops.low_bit import INT4, quantise

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
HIDDEN, FFN_DIM, EXPERTS, TOP_K, HEADS, HEAD_DIM, PAGE = 64, 48, 8, 2, 4, 32, 16
BACKEND = make_backend(GPUTarget("cuda", 80, 32))


@pytest.fixture
def variants(monkeypatch):
    """Kernel name -> what its launches compile for; nothing runs."""
    found = defaultdict(set)

    def run(kernel, *arguments, grid, warmup, **constants):
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        _, specialization, options = bind(*arguments, **constants)
        found[kernel.__name__].add((str(specialization), str(options)))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return found


def rows(tokens: int, *sizes: int) -> torch.Tensor:
    return torch.zeros(tokens, *sizes, dtype=torch.bfloat16)


def integers(*sizes: int) -> torch.Tensor:
    return torch.zeros(sizes, dtype=torch.int32)


def heads(tokens: int):
    tables = torch.zeros(512, HEAD_DIM // 2), torch.zeros(512, HEAD_DIM // 2)
    return rows(tokens, HEADS, HEAD_DIM), rows(tokens, HEADS, HEAD_DIM), tables


def call(op: str, tokens: int) -> tuple:
    """Arguments of an op's cell, or a backward's with the gradients of its outputs in front."""
    x, weight, needs = rows(tokens, HIDDEN), torch.zeros(HIDDEN, dtype=torch.bfloat16), [True] * 4
    w13, w2 = rows(EXPERTS, 2 * FFN_DIM, HIDDEN), rows(EXPERTS, HIDDEN, FFN_DIM)
    shares, ids = torch.zeros(tokens, TOP_K), integers(tokens, TOP_K)
    mixture = x, w13, w2, shares, ids, True
    q, k, (cos, sin) = heads(tokens)
    up, down = (quantise(weight, INT4, 16) for weight in (w13, w2))
    if op == "store_kv_":  # tokens sequences of one token each
        cache = rows(7, PAGE, HEADS, HEAD_DIM)
        lens = integers(tokens + 1), integers(tokens)
        return q, k, cache, cache.clone(), integers(tokens, 4), *lens, None, None
    return {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, x, weight, 1e-5),
        "rms_norm_backward": ([x], needs[:2], x, weight, 1e-5),
        "add_rms_norm_backward": ([x, x], needs[:3], x, x, weight, 1e-5),
        "silu_mul": (x,),
        "silu_mul_backward": ([rows(tokens, HIDDEN // 2)], needs[:1], x),
        "rope": (q, k, cos, sin, integers(tokens), True, None),
        "route_experts": (rows(tokens, EXPERTS), TOP_K, integers(tokens)),
        "route_experts_backward": ([shares], needs[:1], rows(tokens, EXPERTS), TOP_K, None),
        "linear": (x, rows(FFN_DIM, HIDDEN), True),
        "expert_mlp": mixture,
        "linear_low_bit": (x, up.qweight[0], up.scales[0], None, 4, 16, None),
        "expert_mlp_low_bit": (x, *up[:2], *down[:2], shares, ids, None, None, 4, 16, None, None),
        "expert_mlp_backward": ([x], needs, *mixture),
    }[op]


OPS = ["rms_norm", "add_rms_norm", "rms_norm_backward", "add_rms_norm_backward", "silu_mul"]
OPS += ["silu_mul_backward", "rope", "store_kv_", "route_experts", "route_experts_backward"]
OPS += ["linear", "expert_mlp", "expert_mlp_backward"]


@pytest.mark.parametrize("op", OPS)
def test_the_number_of_tokens_compiles_nothing_anew(op, variants):
    # One is a constant to Triton where it may be, and multiples of 16 are a kind of their own.
    # More than 256 tokens give a program of a norm's backward several rows.
    counts = []
    for tokens in (1, 3, 16, 300, 512):
        dispatch.OPS[op]["triton"].run(*call(op, tokens))
        counts.append({name: len(kinds) for name, kinds in variants.items()})
    assert counts[0] and counts == [counts[0]] * 5


@pytest.mark.parametrize("op", ["expert_mlp", "expert_mlp_low_bit", "linear_low_bit"])
def test_few_tokens_share_their_kernels(op, variants):
    for tokens in (1, 2, 16, 17):
        inputs = call(op, tokens)
        inputs = (*inputs[:-1], False) if op == "expert_mlp" else inputs
        dispatch.OPS[op]["triton"].run(*inputs)
    assert len(variants.pop("expert_combine_kernel", {None})) == 1
    # Tiles have 16 rows or 32.
    assert {len(kinds) for kinds in variants.values()} == {2}

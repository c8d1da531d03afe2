"""The C++ kernel of expert_mlp_low_bit and its GEMM path: odd sizes, threads, unused experts."""

import sys

import pytest
import torch
from low_bit_cases import KINDS, Kind
from native_only import torch_ops_of
from test_expert_mlp_low_bit import NAMES, check, make_call
from tolerance import assert_same

from mistral_kernels.ops import dispatch, expert_mlp_low_bit
from mistral_kernels.ops.low_bit import FP8, INT4, INT8

pytest.importorskip("mistral_kernels._C", reason="installed without a C++ compiler")
pytestmark = pytest.mark.usefixtures("each_instruction_set")

MODULE = sys.modules["mistral_kernels.ops.expert_mlp_low_bit"]
PATHS = {"kernel": sys.maxsize, "GEMMs": 0}  # rows an expert from which on torch multiplies
# (tokens, hidden, ffn_dim, experts, top_k): tails of every vector; more pairs than one pass takes.
CASES = [
    ((9, 88, 136, 3, 2), Kind(INT4, None, symmetric=False)),
    ((131, 48, 144, 5, 2), Kind(INT4, 48, shuffled=True)),
    ((9, 61, 83, 3, 2), Kind(INT8, None, shuffled=True)),
    ((30, 64, 131, 2, 1), Kind(FP8, None)),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sizes", "kind"), CASES, ids=str)
def test_odd_sizes_and_unused_experts(sizes, kind, path, threads, monkeypatch):
    monkeypatch.setattr(MODULE, "many_rows", lambda dtype, bits: (PATHS[path], torch.float32))
    call = make_call(sizes, kind)
    call["expert_ids"].remainder_(sizes[3] - 1)  # nobody chose the last
    for scales in ("w13_scales", "w2_scales"):
        call[scales][-1] = torch.nan
    call["expert_ids"][1] = -1
    call["weights"][1] = torch.nan
    threads(1)
    out = expert_mlp_low_bit(**call, backend="cpu")
    assert (out[1] == 0).all()
    check(out, call)
    threads(3)
    if path == "kernel":
        assert_same(expert_mlp_low_bit(**call, backend="cpu"), out, "3 threads")


@pytest.mark.parametrize("name", ["w13_zeros", "w2_zeros"])
def test_zeros_of_one_projection_only(name):
    call = make_call((3, 64, 96, 4, 2), Kind(INT4, 32, symmetric=False))
    call[name] = None
    check(expert_mlp_low_bit(**call, backend="cpu"), call)


def test_only_many_pairs_go_to_torch(monkeypatch):
    monkeypatch.setattr(MODULE, "many_rows", lambda dtype, bits: (2, torch.float32))  # 8 pairs of 4
    run = dispatch.OPS["expert_mlp_low_bit"]["cpu"].run
    for tokens in (0, 1, 3, 4):
        call = make_call((tokens, 64, 96, 4, 2), KINDS["int8-row"])
        inputs = [call[name] for name in NAMES]
        assert bool(torch_ops_of(run, *inputs)) == (tokens == 4), tokens
        check(run(*inputs), call)


def test_top_k_beyond_the_kernels_table_goes_to_the_reference():
    call = make_call((1, 16, 16, 257, 257), KINDS["int8-row"])
    with pytest.raises(ValueError, match="top_k up to 256"):
        expert_mlp_low_bit(**call, backend="cpu")
    check(expert_mlp_low_bit(**call), call)

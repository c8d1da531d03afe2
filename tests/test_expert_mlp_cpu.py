"""The C++ kernel of expert_mlp and its GEMM path: tile edges, threads, unused experts."""

import sys
from functools import partial

import pytest
import torch
from native_only import torch_ops_of
from routed import check, make_call
from tolerance import assert_same

from mistral_kernels.ops import dispatch, expert_mlp

pytest.importorskip("mistral_kernels._C", reason="installed without a C++ compiler")
pytestmark = pytest.mark.usefixtures("each_instruction_set")

MODULE = sys.modules["mistral_kernels.ops.expert_mlp"]


@pytest.fixture(params=dispatch.KERNEL_DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=["kernel", "GEMMs"])
def path(request, monkeypatch):
    """Sends calls that are not batch-invariant to one of the two."""
    rows = {"kernel": sys.maxsize, "GEMMs": 0}[request.param]
    monkeypatch.setattr(MODULE, "few_rows", lambda dtype: rows)
    return request.param


# (tokens, hidden, ffn_dim, experts, top_k): tails of every vector; more pairs than one pass takes.
CASES = [(1, 161, 203, 8, 2), (9, 95, 129, 3, 2), (30, 64, 131, 2, 1), (131, 33, 130, 5, 2)]


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_sizes_around_a_vector(sizes, dtype, path):
    call = make_call(*sizes, dtype=dtype)
    check(expert_mlp(**call, backend="cpu"), call)


def test_unused_experts_and_skipped_slots_are_not_read(dtype, path):
    call = make_call(21, 96, 144, 6, 2, dtype=dtype)
    call["expert_ids"].remainder_(4)  # nobody chose 4 and 5
    call["w13"][4:], call["w2"][4:] = torch.nan, torch.nan
    call["expert_ids"][::3, 0] = torch.tensor([-1, 6, 2**31 - 1, -(2**31), 99, -5, 7])
    call["weights"][::3, 0] = torch.nan
    call["expert_ids"][4] = -1
    call["x"][4] = torch.nan
    out = expert_mlp(**call, backend="cpu")
    assert (out[4] == 0).all(), "both slots are skipped"
    call["x"][4] = 0  # the oracle multiplies it with nothing
    check(out, call)
    call["expert_ids"].fill_(6)
    assert (expert_mlp(**call, backend="cpu") == 0).all()


def test_without_experts_every_slot_is_skipped(dtype, path):
    call = make_call(5, 16, 24, 1, 1, dtype=dtype)
    call["w13"], call["w2"] = call["w13"][:0], call["w2"][:0]
    assert not expert_mlp(**call, backend="cpu").any()


def test_a_nan_stays_in_its_token(dtype, path):
    call = make_call(12, 32, 48, 4, 2, dtype=dtype)
    call["expert_ids"][5, 0] = -1  # its empty slot must not pick up another token's NaN
    call["x"][[0, 11]] = torch.nan
    out = expert_mlp(**call, backend="cpu")
    assert out[[0, 11]].isnan().all() and not out[1:11].isnan().any()


@pytest.mark.parametrize("tokens", [1, 23])
def test_bits_do_not_depend_on_the_number_of_threads(tokens, dtype, threads):
    call = make_call(tokens, 160, 200, 4, 2, dtype=dtype)
    run = partial(expert_mlp, **call, batch_invariant=True, backend="cpu")
    threads(1)
    expected = run()
    for count in (2, 3):
        threads(count)
        assert_same(run(), expected, f"{count} threads")


def test_a_token_has_the_same_bits_among_any_others(dtype):
    call = make_call(150, 65, 70, 3, 2, dtype=dtype)
    whole = expert_mlp(**call, batch_invariant=True, backend="cpu")  # 128 tokens at a time
    for tokens in (*range(1, 10), 17, 40):
        rows = slice(150 - tokens, 150)
        fewer = {**call, **{name: call[name][rows] for name in ("x", "weights", "expert_ids")}}
        out = expert_mlp(**fewer, batch_invariant=True, backend="cpu")
        assert_same(out, whole[rows], f"{tokens} tokens")


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_only_many_pairs_go_to_torch(batch_invariant, dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "few_rows", lambda dtype: 2)  # 8 pairs of 4 experts
    for tokens in (0, 1, 4, 5):
        call = make_call(tokens, 160, 184, 4, 2, dtype=dtype)
        run = partial(dispatch.OPS["expert_mlp"]["cpu"].run, *call.values(), batch_invariant)
        assert bool(torch_ops_of(run)) == (tokens == 5 and not batch_invariant), tokens
        check(run(), call)


def test_gemms_work_in_chunks(monkeypatch, dtype):
    call = make_call(11, 64, 96, 4, 2, dtype=dtype)
    monkeypatch.setattr(MODULE, "few_rows", lambda dtype: 0)
    for workspace in (1, 9000):  # room for less than a token, for a few
        monkeypatch.setattr(MODULE, "WORKSPACE_BYTES", workspace)
        check(expert_mlp(**call, backend="cpu"), call)


def test_top_k_beyond_the_kernels_table_goes_to_the_reference():
    call = make_call(1, 4, 4, 257, 257)
    with pytest.raises(ValueError, match="top_k up to 256"):
        expert_mlp(**call, backend="cpu")
    check(expert_mlp(**call), call)
    widest = make_call(2, 4, 4, 256, 256)
    check(expert_mlp(**widest, backend="cpu"), widest)

"""The shipped csrc/cuda/expert_mlp.cu on the host emulator."""

import sys

import pytest
import shapes
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from emulator.orders import ordered
from routed import check, deal, make_call
from tolerance import assert_same

from mistral_kernels.ops import dispatch

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

MODULE = sys.modules["mistral_kernels.ops.expert_mlp"]
CELL = dispatch.OPS["expert_mlp"]["cuda"]
DTYPES = pytest.mark.parametrize("dtype", CELL.dtypes, ids=str)


def refusal(call) -> str | None:
    return CELL.refuses(dict(MODULE._facts(*call.values(), False)))


def emulate(call):
    """What the CUDA kernels write; checks that they write nothing else."""
    assert refusal(call) is None
    with GuardBands() as guard:
        inputs = [guard(value) for value in call.values()]
        out = guard.output(call["x"].shape, call["x"].dtype)
        inner = guard.output((call["expert_ids"].numel(), call["w2"].shape[2]), out.dtype)
        MODULE._launch(emulated_core().expert_mlp_cuda, *inputs, out, inner, 0, 0)
    return out


# (tokens, hidden, ffn_dim, experts, top_k). Tokens around a tile of 8; columns around a strip of
# 16; k around a step of 32 and around the turns of all warps, 512 for hidden and 1024 for ffn_dim.
SIZES = [
    (0, 16, 24, 8, 2),
    (1, 288, 264, 8, 2),
    (3, 160, 192, 8, 2),
    (7, 96, 152, 7, 3),
    (8, 40, 64, 5, 1),
    (9, 32, 72, 5, 2),
    (16, 128, 136, 8, 2),
    (16, 56, 48, 4, 4),
    (8, 24, 40, 8, 8),
    (16, 64, 8, 1, 1),
    (16, 8, 64, 1, 1),
    (2, 520, 1032, 2, 1),
    (1, 1048, 520, 1, 1),
]


@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, dtype):
    call = make_call(*sizes, dtype=dtype)
    check(emulate(call), call)


# Slots of each expert: all on one; most on none; one each; experts that are many or few.
ROWS = [[0, 0, 32, 0], [16, 0, 0, 0, 15], [1] * 8, [0] * 40 + [3], [5, 6, 7], [0, 0]]


@DTYPES
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_what_nobody_chose_is_not_read(rows, dtype):
    call = deal(make_call(16, 64, 80, len(rows), 2, dtype=dtype), rows)
    idle = ~((call["expert_ids"] >= 0) & (call["expert_ids"] < len(rows))).any(1)
    call["x"][idle] = torch.nan
    out = emulate(call)
    assert (out[idle] == 0).all()
    call["x"][idle] = 0  # the oracle multiplies it with nothing
    check(out, call)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_fewer_pairs_than_experts_or_more(tokens, dtype):
    # 5 tokens have more pairs than experts. Slots repeat and skip experts.
    ids = torch.tensor([[7, 7], [-1, 9], [7, 2], [-9, 0], [2, 5]], dtype=torch.int32)[:tokens]
    call = make_call(tokens, 24, 40, 9, 2, dtype=dtype)
    call["expert_ids"] = ids.contiguous()
    used = torch.isin(torch.arange(9), ids)
    call["w13"][~used], call["w2"][~used] = torch.nan, torch.nan
    check(emulate(call), call)


@DTYPES
@pytest.mark.parametrize("tokens", [6, 12])
def test_nan_rows_stay_alone(tokens, dtype):
    call = make_call(tokens, 24, 40, 3, 2, dtype=dtype)
    call["expert_ids"][1, 0] = -1  # its empty slot must not pick up another token's NaN
    clean = emulate(call)
    call["x"][0], call["weights"][5, 1] = torch.nan, torch.nan
    out = emulate(call)
    assert out[[0, 5]].isnan().all()
    beside = [row for row in range(tokens) if row not in (0, 5)]
    assert_same(out[beside], clean[beside], "rows beside a NaN")


@DTYPES
def test_a_row_has_the_same_bits_among_any_others(dtype):
    call = make_call(16, 136, 200, 4, 2, dtype=dtype)
    whole = emulate(call)
    for rows in ([4], [0, 1], [7, 3, 11], list(range(5, 14))):
        picked = {name: call[name][rows] for name in ("x", "weights", "expert_ids")}
        assert_same(emulate({**call, **picked}), whole[rows], f"rows {rows}")


@pytest.mark.parametrize("tokens", [3, 16])
def test_bits_do_not_depend_on_the_order_of_threads(tokens, orders):
    call = make_call(tokens, 520, 136, 4, 2, dtype=torch.bfloat16)
    with ordered(emulated_core().__file__, "forward"):
        expected = emulate(call)
    for seed in range(2):
        with ordered(emulated_core().__file__, orders, seed):
            assert_same(emulate(call), expected, f"seed {seed}")


@DTYPES
def test_slots_are_summed_in_order(dtype):
    # 2^27 + 1 - 2^27 is 0 in fp32 in slot order, 1 in any order that adds 1 last.
    call = make_call(2, 8, 8, 3, 3, dtype=dtype)
    for name in ("w13", "w2"):
        call[name][1:] = call[name][0]
    call["expert_ids"] = torch.tensor([[0, 1, 2], [2, 0, 1]], dtype=torch.int32)
    call["weights"] = torch.tensor([[2.0**27, 1, -(2.0**27)], [2.0**27, -(2.0**27), 1]])
    out = emulate(call)
    assert (out[0] == 0).all()
    call["weights"] = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    assert_same(out[1], emulate(call)[1], "1 last")


@DTYPES
def test_strided_operands(dtype):
    call = make_call(6, 40, 24, 4, 2, dtype=dtype)
    expected = emulate(call)
    strided = {name: shapes.laid_out(call[name], "padded") for name in ("weights", "expert_ids")}
    for name in ("x", "w13", "w2"):  # NaN beside each row
        wide = torch.nn.functional.pad(call[name], (8, 16), value=torch.nan)
        strided[name] = wide[..., 8:-16]
    assert_same(emulate({**call, **strided}), expected, "padded")
    permuted = {name: shapes.laid_out(call[name], "permuted") for name in ("w13", "w2")}
    assert_same(emulate({**call, **permuted}), expected, "permuted")


def test_without_experts_every_slot_is_skipped():
    call = make_call(5, 16, 24, 1, 1, dtype=torch.bfloat16)
    call["w13"], call["w2"] = call["w13"][:0], call["w2"][:0]
    assert (emulate(call) == 0).all()


def test_without_ffn_dim_the_sum_is_0():
    call = make_call(2, 16, 8, 2, 1, dtype=torch.bfloat16)
    call["w13"], call["w2"] = call["w13"][:, :0], call["w2"][..., :0].contiguous()
    assert (emulate(call) == 0).all()


REFUSED = {
    "tokens": ({"tokens": 17}, "up to 16 tokens, got 17"),
    "pairs": ({"tokens": 13, "top_k": 5}, "tokens * top_k up to 64, got 13 * 5"),
    "invariant": ({"batch_invariant": 1}, "batch_invariant=True"),
    "alignment": ({"alignment": 8}, "16-byte boundaries, got 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    facts, words = REFUSED[name]
    assert words in CELL.refuses(facts)
    assert CELL.refuses({}) is None, "what a model asks"


@pytest.mark.parametrize(
    ("hidden", "ffn_dim", "layout", "bytes"),
    [(16, 8, "", 16), (20, 8, "", 8), (16, 6, "", 4), (17, 8, "", 2), (16, 8, "shifted", 2)],
)
def test_alignment_is_that_of_the_least_aligned_row(hidden, ffn_dim, layout, bytes):
    call = make_call(3, hidden, ffn_dim, 2, 1, dtype=torch.bfloat16)
    if layout == "shifted":
        call["w2"] = torch.nn.functional.pad(call["w2"], (1, 7))[..., 1:-7]
    assert MODULE._alignment(call["x"], call["w13"], call["w2"]) == bytes
    assert (refusal(call) is None) == (bytes == 16)

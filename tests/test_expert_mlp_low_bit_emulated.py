"""The shipped csrc/cuda/expert_mlp_low_bit.cu on the host emulator."""

import sys

import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from emulator.orders import ordered
from low_bit_cases import KINDS, Kind
from test_expert_mlp_low_bit import check, make_call
from tolerance import assert_same

from mistral_kernels.ops import dispatch
from mistral_kernels.ops.low_bit import FP8, INT4, INT8, LowBit

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

MODULE = sys.modules["mistral_kernels.ops.expert_mlp_low_bit"]
CELL = dispatch.OPS["expert_mlp_low_bit"]["cuda"]


def weight_of(call: dict, name: str) -> LowBit:
    return LowBit(*(call[name + end] for end in ("", "_scales", "_zeros", "_perm")))


def emulate(call: dict) -> torch.Tensor:
    """Return what the CUDA kernels write; checks that they write nothing else."""
    up, down = weight_of(call, "w13"), weight_of(call, "w2")
    x, weights, expert_ids = call["x"], call["weights"], call["expert_ids"]
    facts = MODULE._facts(
        x, up[0], up[1], down[0], down[1], weights, expert_ids, None, None, 4, None, None, None
    )
    assert CELL.refuses(dict(facts)) is None
    with GuardBands() as guard:
        out = guard.output(x.shape, x.dtype)
        inner = guard.output((expert_ids.numel(), down.shape[2]), x.dtype)
        inputs = [guard(x), LowBit(*map(guard, up)), LowBit(*map(guard, down))]
        inputs += [guard(weights), guard(expert_ids), out, inner]
        MODULE._launch(emulated_core().expert_mlp_low_bit_cuda, *inputs, 0, 0)
    return out


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    # hidden is of more than a step of each warp; codes in either dtype are the other op's tests.
    dtype = CELL.dtypes[list(KINDS).index(name) % 2]
    call = make_call((3, 640, 256, 3, 2), KINDS[name], dtype)
    check(emulate(call), call)


# (tokens, hidden, ffn_dim, experts, top_k): none; one column; columns around a strip of 16; more
# pairs than experts; the most pairs there may be, which take more shared memory.
SIZES = [(0, 32, 64, 8, 2), (1, 32, 32, 8, 2), (7, 96, 160, 5, 3), (8, 160, 32, 9, 8)]


@pytest.mark.parametrize("codes", [INT4, INT8, FP8], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, codes):
    call = make_call(sizes, Kind(codes, 32 if codes == INT4 else None), torch.bfloat16)
    check(emulate(call), call)


@pytest.mark.parametrize("name", ["int4-g32-act-order", "fp8-row"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_what_nobody_chose_is_not_read(tokens, name):
    # 5 tokens have more pairs than experts. Slots repeat and skip experts; a token is idle.
    call = make_call((tokens, 128, 128, 9, 2), KINDS[name], torch.float16)
    ids = torch.tensor([[7, 7], [-1, 9], [7, 2], [-9, 0], [2, 5]], dtype=torch.int32)[:tokens]
    call["expert_ids"] = ids.contiguous()
    unused = ~torch.isin(torch.arange(9), ids)
    call["w13_scales"][unused], call["w2_scales"][unused] = torch.nan, torch.nan
    for perm in ("w13_perm", "w2_perm"):
        if call[perm] is not None:
            call[perm][unused] = 2**30
    call["x"][1] = torch.nan
    out = emulate(call)
    assert (out[1] == 0).all()
    call["x"][1] = 0  # the oracle multiplies it with nothing
    for perm in ("w13_perm", "w2_perm"):
        if call[perm] is not None:
            call[perm][unused] = torch.arange(call[perm].shape[1], dtype=torch.int32)
    check(out, call)


@pytest.mark.parametrize("name", ["int4-row-zeros", "int8-row"])
def test_a_token_has_the_same_bits_among_any_others(name):
    call = make_call((8, 128, 160, 4, 2), KINDS[name], torch.bfloat16)
    call["x"][5] = torch.nan
    whole = emulate(call)
    assert whole[5].isnan().all() and whole[[4, 6]].isfinite().all()
    for rows in ([4], [7, 3, 1]):
        picked = {key: call[key][rows] for key in ("x", "weights", "expert_ids")}
        assert_same(emulate({**call, **picked}), whole[rows], f"rows {rows}")


@pytest.mark.parametrize("name", ["int4-g32-act-order", "int8-row"])
def test_bits_do_not_depend_on_the_order_of_threads(name, orders):
    call = make_call((4, 640, 288, 4, 2), KINDS[name], torch.bfloat16)
    with ordered(emulated_core().__file__, "forward"):
        expected = emulate(call)
    with ordered(emulated_core().__file__, orders):
        assert_same(emulate(call), expected, "order")


def test_slots_are_summed_in_order():
    # 2^27 + 1 - 2^27 is 0 in fp32 in slot order, 1 in any order that adds 1 last.
    call = make_call((1, 32, 32, 3, 3), Kind(INT8, None), torch.float16)
    for end in ("", "_scales"):
        for name in ("w13", "w2"):
            call[name + end][1:] = call[name + end][0]
    call["expert_ids"] = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    call["weights"] = torch.tensor([[2.0**27, 1, -(2.0**27)]])
    assert (emulate(call) == 0).all()


def test_strided_operands():
    call = make_call((5, 64, 96, 4, 2), KINDS["int4-g32"], torch.bfloat16)
    expected = emulate(call)
    call["x"] = torch.nn.functional.pad(call["x"], (8, 16), value=torch.nan)[:, 8:-16]
    call["weights"] = torch.nn.functional.pad(call["weights"], (1, 2), value=torch.nan)[:, 1:-2]
    call["expert_ids"] = torch.nn.functional.pad(call["expert_ids"], (3, 0), value=2)[:, 3:]
    assert_same(emulate(call), expected, "padded")


def test_without_experts_every_slot_is_skipped():
    call = make_call((3, 32, 64, 1, 1), KINDS["int8-row"], torch.bfloat16)
    call |= {key: call[key][:0] for key in ("w13", "w13_scales", "w2", "w2_scales")}
    assert (emulate(call) == 0).all()


REFUSED = {
    "tokens": ({"tokens": 9}, "up to 8 tokens, got 9"),
    "pairs": ({"tokens": 8, "top_k": 9}, "tokens * top_k up to 64, got 8 * 9"),
    "groups": ({"group_multiple": 16}, "multiple of 32 columns, got multiples of 16"),
    "alignment": ({"alignment": 8}, "16-byte boundaries, got 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    facts, words = REFUSED[name]
    assert words in CELL.refuses(facts)
    assert CELL.refuses({}) is None, "what a model asks"

"""expert_mlp_low_bit against expert_mlp's float64 loop on the dequantised weights."""

import inspect
from itertools import product

import low_bit_cases
import oracle
import peer
import pytest
import refusal
import registration
import routed
import torch
from low_bit_cases import KINDS, Kind
from test_linear_low_bit import exact_weight
from tolerance import assert_close, assert_same

from mistral_kernels import ops
from mistral_kernels.ops.low_bit import LowBit

OP = "expert_mlp_low_bit"
# (tokens, hidden, ffn_dim, experts, top_k): none, decode, more than an expert's few rows, odd k.
CASES = [(0, 128, 128, 8, 2), (1, 128, 256, 8, 2), (5, 256, 128, 5, 3), (40, 128, 128, 4, 2)]

NAMES = [name for name in inspect.signature(ops.expert_mlp_low_bit).parameters if name != "backend"]


def make_call(sizes: tuple[int, ...], kind: Kind, dtype=torch.float32, device="cpu") -> dict:
    """Return the arguments of a call with random routing."""
    tokens, hidden, ffn_dim, experts, top_k = sizes
    plain = routed.make_call(tokens, 1, 1, experts, top_k, dtype=dtype, device=device)
    w13 = low_bit_cases.low_bit((experts, 2 * ffn_dim, hidden), kind, device)
    w2 = low_bit_cases.low_bit((experts, hidden, ffn_dim), kind, device)
    return {
        "x": torch.randn(tokens, hidden, device=device).to(dtype),
        **dict(zip(("w13", "w13_scales", "w13_zeros", "w13_perm"), w13, strict=True)),
        **dict(zip(("w2", "w2_scales", "w2_zeros", "w2_perm"), w2, strict=True)),
        "weights": plain["weights"],
        "expert_ids": plain["expert_ids"],
        **kind.how,
    }


def check(out: torch.Tensor, call: dict) -> None:
    """Compare with a float64 loop over tokens and slots."""
    assert out.dtype == call["x"].dtype and out.is_contiguous()
    up, down = (
        LowBit(*(call[w + end] for end in ("", "_scales", "_zeros", "_perm")))
        for w in ("w13", "w2")
    )
    dense = {name: call[name] for name in ("x", "weights", "expert_ids")}
    exact = oracle.expert_mlp(
        **{name: oracle.f64(value) for name, value in dense.items()},
        w13=exact_weight(up).cpu().numpy(),
        w2=exact_weight(down).cpu().numpy(),
    )
    plain = peer.expert_mlp(
        **{name: value.cpu() for name, value in dense.items()},
        w13=up.dequantise(out.dtype).cpu(),
        w2=down.dequantise(out.dtype).cpu(),
    )
    assert_close(out, plain, torch.from_numpy(exact), OP)


INTERPRETED = {CASES[0]: KINDS, CASES[1]: ("int4-g32-act-order",), CASES[3]: ("fp8-g128",)}
MIXTURES = [
    pytest.param(
        *(sizes, name),
        marks=() if name in INTERPRETED.get(sizes, ()) else pytest.mark.not_interpreted,
    )
    for sizes, name in product(CASES, KINDS)
    if sizes != CASES[2] or name == "int8-g32-zeros-act-order"
]


@pytest.mark.parametrize(("sizes", "name"), MIXTURES, ids=str)
def test_expert_mlp_low_bit(sizes, name, dtype, backend, device):
    call = make_call(sizes, KINDS[name], dtype, device)
    out = ops.expert_mlp_low_bit(**call, backend=backend)
    check(out, call)
    assert_same(ops.expert_mlp_low_bit(**call, backend=backend), out, "again")


@pytest.mark.parametrize("name", ["int4-g128-zeros", "fp8-row"])
def test_skipped_slots_and_unused_experts(name, backend, device):
    call = make_call((9, 128, 128, 4, 2), KINDS[name], device=device)
    call["expert_ids"][:] = torch.tensor([1, 3], device=device)
    for token, slot, no_expert in ((0, 0, -1), (3, 1, 4), (5, 0, 99), (5, 1, -7)):
        call["expert_ids"][token, slot] = no_expert
        call["weights"][token, slot] = torch.nan
    for scales in ("w13_scales", "w2_scales"):  # experts that nobody chose are not read
        call[scales][[0, 2]] = torch.nan
    check(ops.expert_mlp_low_bit(**call, backend=backend), call)


def test_registration(backend, device):
    for name in ("int4-g32-act-order", "int8-row"):  # torch's check cannot compare float8
        call = make_call((3, 128, 128, 4, 2), KINDS[name], device=device)
        registration.check(OP, *(call[name] for name in NAMES), backend)


VALID = {
    name: value
    for name, value in make_call((3, 64, 96, 4, 2), KINDS["int4-g32"]).items()
    if value is not None
}
REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("w13", torch.ones(4, 190, 32).byte(), "192", "(4, 190, 32)"),
    refusal.Case("w2", torch.ones(4, 63, 48).byte(), "hidden=64", "(4, 63, 48)"),
    refusal.Case("w13_scales", torch.ones(4, 192, 3), "2)", "(4, 192, 3)"),
    refusal.Case("w13_scales", torch.ones(4, 192, 2).half(), "torch.bfloat16", "torch.float16"),
    refusal.Case("w2_zeros", torch.ones(4, 64, 3), "torch.uint8", "torch.float32"),
    refusal.Case("w2_perm", torch.ones(4, 64).int(), "96", "(4, 64)"),
    refusal.Case("bits", 8, "torch.int8", "torch.uint8"),
    refusal.Case("group_size", 64, "divide 96", "64"),
    refusal.Case("expert_ids", torch.ones(3, 1).int(), "top_k=2", "(3, 1)"),
]


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.expert_mlp_low_bit, VALID, case)

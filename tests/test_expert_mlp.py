"""expert_mlp against a float64 loop over tokens and slots, on every backend."""

import functools
import sys

import gradients
import pytest
import refusal
import registration
import routed
import shapes
import torch
from routed import every_expert_on_every_token, make_call
from tolerance import assert_same
from torch.utils.flop_counter import FlopCounterMode

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

OP = "expert_mlp"
MODULE = sys.modules["mistral_kernels.ops.expert_mlp"]
# (tokens, hidden, ffn_dim, experts, top_k): none, decode, odd and prime sizes, k of 1 and of all.
# The model rounds to the dtype on the way; ffn_dim is wide enough that no single rounding decides
# the error of a row, which would make the comparison with torch a matter of luck.
CASES = [
    (0, 16, 24, 8, 2),
    (1, 288, 264, 8, 2),
    (3, 160, 192, 8, 2),
    (37, 96, 128, 4, 2),
    (7, 97, 149, 5, 3),
    (5, 160, 184, 4, 1),
    (5, 160, 184, 4, 4),
    (6, 160, 184, 1, 1),
]


def serve(call: dict, backend: str, **how) -> torch.Tensor:
    """Call the op; skips the rest of a test whose call the backend refuses, as only cuda does."""
    inputs = (*call.values(), how.get("batch_invariant", False))
    facts = dict(MODULE._facts(*inputs))
    if reason := dispatch.OPS[OP][backend].refuses(facts):
        pytest.skip(reason)
    return ops.expert_mlp(**call, **how, backend=backend)


def check(out: torch.Tensor, call: dict) -> None:
    assert out.dtype == call["x"].dtype and out.is_contiguous()
    routed.check(out, call)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_expert_mlp(sizes, batch_invariant, dtype, backend, device):
    call = make_call(*sizes, dtype=dtype, device=device)
    run = functools.partial(serve, call, backend, batch_invariant=batch_invariant)
    out = run()
    check(out, call)
    if dtype == torch.bfloat16:
        assert_same(run(), out, "again")


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_all_tokens_to_one_expert(expert, dtype, backend, device):
    call = make_call(19, 48, 160, 8, 1, dtype=dtype, device=device)
    call["expert_ids"].fill_(expert)
    for name in ("w13", "w2"):  # experts that nobody chose are not read
        call[name][torch.arange(8, device=device) != expert] = torch.nan
    check(serve(call, backend), call)


def test_a_repeated_expert_counts_in_each_slot(backend, device):
    call = make_call(5, 16, 24, 4, 2, device=device)
    call["expert_ids"][:, 1] = call["expert_ids"][:, 0]
    check(ops.expert_mlp(**call, backend=backend), call)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_skipped_slots(batch_invariant, dtype, backend, device):
    call = make_call(9, 80, 160, 4, 2, dtype=dtype, device=device)
    for token, slot, no_expert in (
        (0, 0, -1),
        (3, 1, 4),
        (5, 0, 99),
        (5, 1, -7),
        (8, 1, 2**31 - 1),
    ):
        call["expert_ids"][token, slot] = no_expert
        call["weights"][token, slot] = torch.nan
    out = serve(call, backend, batch_invariant=batch_invariant)
    check(out, call)
    assert (out[5] == 0).all(), "both slots are skipped"
    call["expert_ids"].fill_(-1)
    assert (ops.expert_mlp(**call, backend=backend) == 0).all()


def test_nan_rows_stay_alone(backend, device):
    call = make_call(6, 16, 24, 4, 2, device=device)
    out = ops.expert_mlp(**call, batch_invariant=True, backend=backend)
    call["x"][2], call["weights"][4, 1] = torch.nan, torch.nan
    poisoned = ops.expert_mlp(**call, batch_invariant=True, backend=backend)
    assert poisoned[[2, 4]].isnan().all()
    clean = [0, 1, 3, 5]
    assert_same(poisoned[clean], out[clean], "rows beside a NaN")


def test_smallest_sizes(backend, device):
    call = make_call(3, 1, 1, 2, 2, device=device)
    check(ops.expert_mlp(**call, backend=backend), call)


def test_equal_experts_are_one_dense_network(backend, device):
    call = make_call(11, 16, 24, 4, 2, device=device)
    call["w13"][1:], call["w2"][1:] = call["w13"][0], call["w2"][0]
    check(ops.expert_mlp(**call, backend=backend), call)
    dense = {**call, "weights": torch.ones(11, 1, device=device)}
    dense["expert_ids"] = torch.zeros(11, 1, dtype=torch.int32, device=device)
    check(ops.expert_mlp(**call, backend=backend), {**dense, "w13": call["w13"][:1]})


def test_batch_invariant_rows_do_not_depend_on_their_neighbours(dtype, backend, device):
    call = make_call(70, 32, 48, 4, 2, dtype=dtype, device=device)
    batch = serve(call, backend, batch_invariant=True)
    for rows in ([4], [7, 3, 11], list(range(5, 38))):
        fewer = {**call, **{name: call[name][rows] for name in ("x", "weights", "expert_ids")}}
        out = ops.expert_mlp(**fewer, batch_invariant=True, backend=backend)
        assert_same(out, batch[rows], f"{len(rows)} rows")


def test_many_tokens_are_worked_in_chunks(monkeypatch):
    call = make_call(11, 16, 24, 4, 2)
    how = {**call, "batch_invariant": True, "backend": "reference"}
    whole = ops.expert_mlp(**how)
    for workspace in (1, 4000):  # room for less than a token, for a few
        monkeypatch.setattr(MODULE, "WORKSPACE_BYTES", workspace)
        assert_same(ops.expert_mlp(**how), whole, f"{workspace} bytes")


def test_slots_are_summed_in_order(backend, device):
    # 1e8 + 1 - 1e8 is 0 in fp32 in slot order, 1 in any order that adds 1 last.
    call = make_call(1, 1, 1, 3, 3, device=device)
    call["x"].fill_(1.0)
    call["w13"].fill_(1.0)
    inner = float(torch.nn.functional.silu(torch.ones(())))
    call["w2"].copy_(torch.tensor([1e8, 1.0, -1e8]).view(3, 1, 1) / inner)
    call["weights"].fill_(1.0)
    for ids, expected in (((0, 1, 2), 0.0), ((0, 2, 1), 1.0), ((1, 0, 2), 0.0)):
        call["expert_ids"].copy_(torch.tensor([ids]))
        out = ops.expert_mlp(**call, backend=backend)
        assert out.item() == pytest.approx(expected, abs=1e-6), f"slots {ids}"


def test_strided_operands(backend, device):
    call = make_call(6, 16, 24, 4, 2, device=device)
    strided = {name: shapes.laid_out(value, "padded") for name, value in call.items()}
    strided["w13"] = shapes.laid_out(call["w13"], "permuted")
    out = ops.expert_mlp(**strided, backend=backend)
    check(out, call)
    if backend != "reference":  # torch's GEMM adds up in another order where strides differ
        assert_same(out, ops.expert_mlp(**call, backend=backend), "strided")


def gradient_case(sizes, device="cpu"):
    call = make_call(*sizes, device=device)
    expert_ids = call.pop("expert_ids")
    expert_ids[0, 1], expert_ids[-1, 0] = -1, sizes[3]
    return call, expert_ids


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_gradients_on_the_reference(batch_invariant):
    inputs, expert_ids = gradient_case((4, 3, 2, 3, 2))
    how = {"expert_ids": expert_ids, "batch_invariant": batch_invariant, "backend": "reference"}
    ours = functools.partial(ops.expert_mlp, **how)
    gradients.check(
        ours, functools.partial(every_expert_on_every_token, expert_ids=expert_ids), inputs
    )


@pytest.mark.parametrize(
    ("needed", "products"), [("x", 5), ("w2", 4), ("w13", 5), ("weights", 4)], ids=str
)
def test_frozen_inputs_cost_no_products(needed, products, monkeypatch):
    # Of hidden * ffn_dim operations: gate_up 2, back through w2 1, weights 1, w2 1, w13 2, x 2.
    call, flops = make_call(7, 8, 6, 3, 2), []
    row = dispatch.OPS["expert_mlp_backward"]
    cell = row["reference"]

    def counted(*inputs):
        with FlopCounterMode(display=False) as counter:
            gradients = cell.run(*inputs)
        flops.append(counter.get_total_flops())
        return gradients

    monkeypatch.setitem(row, "reference", dispatch.Cell(counted))
    call[needed].requires_grad_()
    ops.expert_mlp(**call, backend="reference").sum().backward()
    assert flops == [products * 2 * 7 * 2 * 8 * 6]


def test_gradients(backend, device):
    inputs, expert_ids = gradient_case((7, 16, 24, 3, 2), device)
    ours = functools.partial(ops.expert_mlp, expert_ids=expert_ids, backend=backend)
    gradients.check_float32(
        ours, functools.partial(every_expert_on_every_token, expert_ids=expert_ids), inputs
    )
    gradients.check_compiled(ours, inputs)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 2])
def test_registration(tokens, layout, backend, device):
    call = make_call(tokens, 8, 6, 2, 1, device=device)
    tensors = [shapes.laid_out(value, layout).detach() for value in call.values()]
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    for batch_invariant in (False, True) if layout == "contiguous" else (False,):
        registration.check("expert_mlp", *tensors, batch_invariant, backend)


VALID = {**make_call(3, 8, 6, 4, 2), "batch_invariant": False}
REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("x", torch.ones(3, 7), "7", "8"),
    refusal.Case("w13", torch.ones(4, 11, 8), "12", "(4, 11, 8)"),
    refusal.Case("w13", torch.ones(3, 12, 8), "experts=4", "(3, 12, 8)"),
    refusal.Case("w13", VALID["w13"].half(), "torch.float32", "torch.float16"),
    refusal.Case("w2", torch.ones(4, 7, 6), "hidden=8", "(4, 7, 6)"),
    refusal.Case("w2", VALID["w2"].half(), "torch.float32", "torch.float16"),
    refusal.Case("weights", torch.ones(4, 2), "tokens=3", "(4, 2)"),
    refusal.Case("weights", torch.ones(3, 2).half(), "torch.float32", "torch.float16"),
    refusal.Case("expert_ids", torch.ones(3, 1, dtype=torch.int32), "top_k=2", "(3, 1)"),
]


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.expert_mlp, VALID, case)


def test_refuses_no_slots():
    nothing = {**VALID, "expert_ids": VALID["expert_ids"][:, :0]}
    case = refusal.Case("weights", VALID["weights"][:, :0], "1", "0")
    refusal.check(ops.expert_mlp, nothing, case)

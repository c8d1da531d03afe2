"""route_experts against sorting each row in plain Python, on every backend."""

import functools

import gradients
import oracle
import pytest
import refusal
import registration
import torch
from tolerance import assert_close, assert_same

from mistral_kernels import ops

OP = "route_experts"
# (tokens, experts, top_k): Mixtral's 8 and 2, none, one, all, and more experts than a warp has
# lanes.
CASES = [(0, 8, 2), (1, 8, 2), (33, 8, 2), (5, 8, 1), (5, 8, 8), (7, 1, 1), (4, 5, 3), (9, 130, 6)]
VALID = {
    "logits": torch.randn(3, 8),
    "top_k": 2,
    "positions": torch.tensor([0, -1, 7], dtype=torch.int32),
}


def check(result, logits, top_k, positions=None) -> None:
    """Compare ids exactly and weights with the oracle; the peer is torch's softmax of those."""
    exact, ids = map(torch.from_numpy, oracle.route_experts(oracle.f64(logits), top_k, positions))
    weights, expert_ids = result
    wide = torch.promote_types(logits.dtype, torch.float32)
    assert weights.dtype == wide and weights.is_contiguous() and expert_ids.is_contiguous()
    assert_same(expert_ids, ids.int(), "expert_ids")
    peer = torch.softmax(logits.cpu().gather(1, ids.clamp(min=0)).to(wide), -1)
    assert_close(weights.cpu(), peer.masked_fill(ids < 0, 0), exact, "weights")


@pytest.mark.parametrize(("tokens", "experts", "top_k"), CASES)
def test_route_experts(tokens, experts, top_k, dtype, backend, device):
    logits = torch.randn(tokens, experts, device=device).mul(3).to(dtype)
    result = ops.route_experts(logits, top_k, backend=backend)
    check(result, logits, top_k)
    for got, want in zip(ops.route_experts(logits, top_k, backend=backend), result, strict=True):
        assert_same(got, want, "again")


def test_equal_logits_go_to_the_lowest_index(dtype, backend, device):
    rows = [[1, 3, 3, 3], [2, 2, 2, 2], [0, 5, 1, 5], [-0.0, 0.0, -0.0, 0.0], [7, 7, 9, 7]]
    logits = torch.tensor(rows, device=device).to(dtype)
    for top_k, expected in (
        (1, [[1], [0], [1], [0], [2]]),
        (2, [[1, 2], [0, 1], [1, 3], [0, 1], [2, 0]]),
    ):
        result = ops.route_experts(logits, top_k, backend=backend)
        assert result[1].tolist() == expected
        check(result, logits, top_k)


@pytest.mark.parametrize("experts", [16, 130, 300])
def test_ties_among_many_experts(experts, dtype, backend, device):
    # Two values only: nearly every choice is a tie.
    logits = torch.randint(2, (20, experts), device=device).to(dtype)
    check(ops.route_experts(logits, 9, backend=backend), logits, 9)


@pytest.mark.parametrize("experts", [1, 2, 7, 31, 64, 129, 256])
def test_any_number_of_experts(experts, dtype, backend, device):
    logits = torch.randn(5, experts, device=device).to(dtype)
    for top_k in sorted({1, (experts + 1) // 2, experts}):
        check(ops.route_experts(logits, top_k, backend=backend), logits, top_k)


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_order_of_special_values_is_the_reference_s(top_k, dtype, backend, device):
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0, -1.0, -torch.nan])
    logits = kinds[torch.randint(len(kinds), (200, 6))].to(dtype).to(device)
    weights, expert_ids = ops.route_experts(logits, top_k, backend=backend)
    expected, expected_ids = ops.route_experts(logits, top_k, backend="reference")
    assert_same(expert_ids, expected_ids, "expert_ids")
    torch.testing.assert_close(weights, expected, equal_nan=True)


def test_far_apart_and_infinite_logits(backend, device):
    rows = [[1e4, -1e4, 0, 0], [1e30, 1e30, 1, 1], [-torch.inf, 2, -torch.inf, 1], [-1e30] * 4]
    weights, expert_ids = ops.route_experts(torch.tensor(rows, device=device), 2, backend=backend)
    assert expert_ids.tolist() == [[0, 2], [0, 1], [1, 3], [0, 1]]
    exact = torch.tensor(
        [[1, 0], [0.5, 0.5], [1 / (1 + 1 / torch.e), 1 / (1 + torch.e)], [0.5, 0.5]]
    )
    assert_close(weights, exact.to(device), exact.double(), "weights")


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_nan_row_gets_distinct_experts_and_nan_weights(top_k, dtype, backend, device):
    logits = torch.randn(4, 4, device=device).to(dtype)
    clean, clean_ids = ops.route_experts(logits, top_k, backend=backend)
    logits[1], logits[2, 3] = torch.nan, torch.nan
    weights, expert_ids = ops.route_experts(logits, top_k, backend=backend)
    for row in (1, 2):
        chosen = set(expert_ids[row].tolist())
        assert len(chosen) == top_k and chosen <= set(range(4))
        assert weights[row].isnan().all()
    assert_same(weights[[0, 3]], clean[[0, 3]], "weights beside a NaN")
    assert_same(expert_ids[[0, 3]], clean_ids[[0, 3]], "ids beside a NaN")


def test_idle_rows(dtype, backend, device):
    logits = torch.randn(5, 8, device=device).to(dtype)
    logits[3] = torch.nan
    positions = [0, -1, 9, -7, 2]
    packed = torch.tensor(positions, dtype=torch.int32, device=device)
    result = ops.route_experts(logits, 2, positions=packed, backend=backend)
    check(result, logits, 2, positions)
    assert result[1][[1, 3]].tolist() == [[-1, -1]] * 2
    assert result[0][[1, 3]].tolist() == [[0, 0]] * 2


def test_strided_rows_give_the_bits_of_packed_ones(dtype, backend, device):
    logits = torch.randn(6, 24, device=device).to(dtype)[::2, 5:13]
    packed = ops.route_experts(logits.contiguous(), 2, backend=backend)
    for got, want in zip(ops.route_experts(logits, 2, backend=backend), packed, strict=True):
        assert_same(got, want, "strided")


def weights_of(route, **how):
    return lambda logits: route(logits, 2, **how)[0]


def plain(logits, top_k, positions=None):
    """Differentiable top-k then softmax by torch."""
    values, expert_ids = logits.topk(top_k)
    weights = values.softmax(-1)
    if positions is not None:
        weights = torch.where((positions < 0)[:, None], 0.0, weights)
    return weights, expert_ids


@pytest.mark.parametrize("positions", [None, VALID["positions"]], ids=["live", "idle rows"])
def test_gradients_on_the_reference(positions):
    ours = functools.partial(ops.route_experts, positions=positions, backend="reference")
    inputs = {"logits": torch.randn(3, 5)}
    gradients.check(weights_of(ours), weights_of(plain, positions=positions), inputs)


def test_gradients(backend, device):
    inputs = {"logits": torch.randn(9, 8, device=device)}
    run = weights_of(functools.partial(ops.route_experts, backend=backend))
    gradients.check_float32(run, weights_of(plain), inputs)
    gradients.check_compiled(run, inputs)


@pytest.mark.parametrize("tokens", [0, 3])
def test_registration(tokens, backend, device):
    wide = torch.randn(tokens, 11, device=device)
    positions = torch.arange(-1, tokens - 1, dtype=torch.int32, device=device)
    for logits in (wide, wide[:, 2:10]):
        logits = logits.detach().requires_grad_()
        registration.check("route_experts", logits, 2, None, backend)
        registration.check("route_experts", logits, 2, positions, backend)


REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("logits", torch.ones(8), "(tokens, experts)", "(8,)"),
    refusal.Case("top_k", 9, "8", "9"),
    refusal.Case("top_k", -1, "1", "-1"),
    refusal.Case("positions", torch.zeros(4, dtype=torch.int32), "tokens=3", "(4,)"),
]


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.route_experts, VALID, case)

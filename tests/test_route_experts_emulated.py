"""The shipped csrc/cuda/route_experts.cu on the host emulator."""

import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from test_route_experts import CASES, check
from test_route_experts_interpreted import DTYPES, POSITIONS, guarded
from tolerance import assert_same

from mistral_kernels import ops
from mistral_kernels.ops.route_experts import _route_experts_native

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def emulate(logits, top_k, positions=None, device=0):
    launch = emulated_core().route_experts_cuda
    with GuardBands() as guard:
        return _route_experts_native(launch, guard(logits), top_k, guard(positions), device, 0)


@each_dtype
@pytest.mark.parametrize(("tokens", "experts", "top_k"), CASES)
def test_route_experts(tokens, experts, top_k, dtype):
    logits = guarded(tokens, experts, dtype)
    check(emulate(logits, top_k), logits, top_k)


def test_any_order_of_threads(orders):
    for case in CASES[-2:]:
        test_route_experts(*case, torch.bfloat16)


@each_dtype
@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 70])
def test_experts_around_a_warp(experts, dtype):
    logits = guarded(3, experts, dtype)
    for top_k in sorted({1, experts}):
        check(emulate(logits, top_k), logits, top_k)


@each_dtype
@pytest.mark.parametrize("experts", [4, 33, 130])
def test_ties_go_to_the_lowest_index(experts, dtype):
    # 1, 0 and -0 only, the last two equal: nearly every choice is a tie.
    zeros = torch.randn(9, experts).sign() * 0.0
    logits = torch.where(torch.rand(9, experts) < 0.2, 1.0, zeros).to(dtype)
    for top_k in (1, 4):
        check(emulate(logits, top_k), logits, top_k)


@each_dtype
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_order_of_special_values_is_the_reference_s(top_k, dtype):
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0, -1.0, -torch.nan])
    logits = kinds[torch.randint(len(kinds), (64, 6))].to(dtype)
    weights, expert_ids = emulate(logits, top_k)
    expected, expected_ids = ops.route_experts(logits, top_k, backend="reference")
    assert_same(expert_ids, expected_ids, "expert_ids")
    torch.testing.assert_close(weights, expected, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("top_k", [1, 2, 40])
def test_a_nan_row_gets_distinct_experts_and_nan_weights(top_k, dtype):
    logits = torch.randn(4, 40).to(dtype)
    clean, clean_ids = emulate(logits, top_k)
    logits[1], logits[2, 33] = torch.nan, torch.nan
    weights, expert_ids = emulate(logits, top_k)
    for row in (1, 2):
        chosen = set(expert_ids[row].tolist())
        assert len(chosen) == top_k and chosen <= set(range(40))
        assert weights[row].isnan().all()
    assert_same(weights[[0, 3]], clean[[0, 3]], "weights beside a NaN")
    assert_same(expert_ids[[0, 3]], clean_ids[[0, 3]], "ids beside a NaN")


@each_dtype
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (40, 34)])
def test_idle_rows(experts, top_k, dtype):
    logits = guarded(len(POSITIONS), experts, dtype)
    logits[3] = torch.nan  # idle
    result = emulate(logits, top_k, torch.tensor(POSITIONS, dtype=torch.int32))
    check(result, logits, top_k, POSITIONS)
    assert result[1][3].tolist() == [-1] * top_k and result[0][3].tolist() == [0] * top_k


@each_dtype
def test_strided_rows_give_the_bits_of_packed_ones(dtype):
    logits = torch.randn(6, 24).to(dtype)[::2, 5:13]
    for got, want in zip(emulate(logits, 2), emulate(logits.contiguous(), 2), strict=True):
        assert_same(got, want, "strided")


def test_an_unknown_device_is_an_error_that_names_the_op():
    with pytest.raises(RuntimeError, match="route_experts: CUDA error: cudaErrorInvalidDevice"):
        emulate(torch.randn(1, 8), 2, device=1)

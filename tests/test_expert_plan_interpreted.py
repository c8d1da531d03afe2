"""The plan of expert_mlp's Triton kernels in Triton's interpreter: a stable sort by expert."""

import pytest
import torch

pytestmark = pytest.mark.interpreter


@pytest.fixture
def plan(monkeypatch):
    """The kernel file, reading eight pairs a step."""
    from mistral_kernels.kernels import expert_plan

    monkeypatch.setattr(expert_plan, "tile_config", lambda pairs: {"BLOCK": 8, "num_warps": 1})
    return expert_plan


def run(plan, expert_ids, experts):
    starts, order, places = (
        torch.full((size,), -77, dtype=torch.int32)
        for size in (experts + 1, expert_ids.numel(), expert_ids.numel())
    )
    plan.expert_plan(expert_ids, experts, starts, order, places)
    return starts.tolist(), order.tolist(), places.tolist()


def check(plan, expert_ids, experts):
    starts, order, places = run(plan, expert_ids, experts)
    ids = expert_ids.flatten().tolist()
    by_expert = [[pair for pair, e in enumerate(ids) if e == own] for own in range(experts)]
    expected = [pair for pairs in by_expert for pair in pairs]
    assert starts == [sum(map(len, by_expert[:e])) for e in range(experts + 1)]
    assert order == expected + [-77] * (len(ids) - len(expected)), "skipped pairs have no row"
    rows = [expected.index(p) if p in expected else -77 for p in range(len(ids))]
    assert places == rows


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 2), (7, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 9, 23])
def test_random_ids(tokens, experts, top_k, plan):
    check(plan, torch.randint(-1, experts + 1, (tokens, top_k), dtype=torch.int32), experts)


def test_empty_experts_and_far_ids(plan):
    ids = torch.tensor([[5, 2**31 - 1], [-(2**31), 5], [6, -1], [1, 5]], dtype=torch.int32)
    check(plan, ids, 6)
    check(plan, torch.full((9, 2), -1, dtype=torch.int32), 4)


def test_strided_ids(plan):
    wide = torch.randint(0, 4, (11, 5), dtype=torch.int32)
    check(plan, wide[:, :2], 4)


def test_the_example_of_the_file(plan):
    starts, order, places = run(plan, torch.tensor([[0, 2], [2, 1], [0, -1]]).int(), 3)
    assert (starts, order[:5], places[:5]) == ([0, 2, 3, 5], [0, 4, 3, 1, 2], [0, 3, 4, 2, 1])


def test_tile_config_has_two_sizes():
    from mistral_kernels.kernels import expert_plan

    configs = [expert_plan.tile_config(pairs) for pairs in (1, 32, 1000, 1024, 1025, 4096, 10**6)]
    assert [config["BLOCK"] for config in configs] == [256] * 4 + [4096] * 3
    assert [config["num_warps"] for config in configs] == [1] * 4 + [8] * 3

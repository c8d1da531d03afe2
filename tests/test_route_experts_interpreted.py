"""route_experts' Triton kernels in Triton's interpreter, around the edges of their tiles.

`test_route_experts.py` runs the same backend there on the cases that every backend gets.
"""

import functools

import gradients
import oracle
import pytest
import torch
from tolerance import assert_close, assert_same

from mistral_kernels import ops

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = [0, -1, 9, -7, 2, 3, 4, -2, 5]


@pytest.fixture
def two_tokens_a_program(monkeypatch):
    from mistral_kernels.kernels import route_experts as kernel

    def tile_config(experts, *_):
        block_experts = 1 << (experts - 1).bit_length()
        return {"BLOCK_TOKENS": 2, "BLOCK_EXPERTS": block_experts, "num_warps": 1}

    monkeypatch.setattr(kernel, "tile_config", tile_config)


def guarded(tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random logits between rows and columns of NaN, which would be chosen first."""
    wide = torch.full((tokens + 2, experts + 2), torch.nan).to(dtype)
    logits = wide[1:-1, 1:-1]
    logits.copy_(torch.randn(tokens, experts).mul(3))
    return logits


def plain(logits: torch.Tensor, top_k: int, positions: torch.Tensor | None) -> torch.Tensor:
    """Weights by torch, differentiable, in float32 or float64."""
    values, _ = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(top_k)
    weights = values.softmax(-1)
    return weights if positions is None else torch.where((positions < 0)[:, None], 0.0, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("live", [True, False], ids=["live", "idle rows"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 1, 1), (2, 4, 4), (3, 5, 2), (4, 8, 2), (9, 9, 3)], ids=str
)
def test_around_a_tile(tokens, experts, top_k, live, dtype, two_tokens_a_program):
    logits = guarded(tokens, experts, dtype)
    listed = None if live else POSITIONS[:tokens]
    positions = None if live else torch.tensor(listed, dtype=torch.int32)
    how = {"positions": positions, "backend": "triton"}
    weights, expert_ids = ops.route_experts(logits, top_k, **how)
    exact, ids = map(torch.from_numpy, oracle.route_experts(oracle.f64(logits), top_k, listed))
    assert_same(expert_ids, ids.int(), "expert_ids")
    assert_close(weights, plain(logits, top_k, positions), exact, "weights")
    # Equal logits in bf16 would make the choice of torch.topk another one, so none are drawn.
    apart = torch.stack([torch.randperm(experts) / 2 for _ in range(tokens)])
    gradients.check_dtype(
        lambda logits: ops.route_experts(logits, top_k, **how)[0],
        functools.partial(plain, top_k=top_k, positions=positions),
        {"logits": apart},
        dtype,
    )


def test_gradient_beside_nan_and_infinity(two_tokens_a_program):
    logits = torch.randn(6, 5)
    logits[1], logits[2, 3], logits[3, 1], logits[4, :4] = (
        torch.nan,
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    found = {}
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        weights, _ = ops.route_experts(leaf, 2, backend=backend)
        weights[:, 0].sum().backward()
        found[backend] = leaf.grad
    torch.testing.assert_close(found["triton"], found["reference"], equal_nan=True)
    assert found["triton"][[0, 5]].isfinite().all()


def test_the_triton_cell_serves_the_backward(monkeypatch):
    from mistral_kernels.kernels import route_experts as kernel

    calls = []
    monkeypatch.setattr(kernel, "route_experts_backward", lambda *given: calls.append(given))
    logits = torch.randn(2, 8, requires_grad=True)
    ops.route_experts(logits, 2, backend="triton")[0].sum().backward()
    assert len(calls) == 1


def test_too_many_experts_are_refused():
    from mistral_kernels.kernels import route_experts as kernel

    logits = torch.zeros(1, kernel.MAX_EXPERTS + 1)
    with pytest.raises(ValueError, match=f"up to {kernel.MAX_EXPERTS} experts"):
        ops.route_experts(logits, 2, backend="triton")


def test_tile_config():
    from mistral_kernels.kernels import route_experts as kernel

    for experts in (1, 8, 9, 256, 257, kernel.MAX_EXPERTS):
        config = kernel.tile_config(experts, 2, torch.bfloat16, (9, 0))
        block = config["BLOCK_EXPERTS"]
        assert experts <= block < 2 * experts
        assert config["BLOCK_TOKENS"] * block == max(256, block)
        assert config["num_warps"] in (1, 2, 4, 8, 16)

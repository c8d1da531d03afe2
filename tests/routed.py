"""Random arguments of a mixture of experts, and what should come out."""

import oracle
import peer
import torch
from tolerance import assert_close

# Ids that are no expert's.
SKIPPED = torch.tensor([-1, 99, 2**31 - 1, -(2**31)], dtype=torch.int32)


def make_call(tokens, hidden, ffn_dim, experts, top_k, *, dtype=torch.float32, device="cpu"):
    """Return the arguments of a call with random routing to distinct experts."""

    def draw(*size):
        return torch.randn(size, device=device).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    logits = torch.randn(tokens, experts, device=device)
    values, expert_ids = logits.topk(top_k)
    return {
        "x": draw(tokens, hidden),
        "w13": draw(experts, 2 * ffn_dim, hidden) / hidden**0.5,
        "w2": draw(experts, hidden, ffn_dim) / ffn_dim**0.5,
        "weights": values.softmax(-1).to(wide),
        "expert_ids": expert_ids.int(),
    }


def deal(call: dict, rows: list[int]) -> dict:
    """Give expert e `rows[e]` of the slots and skip the others; put NaN where nobody may look."""
    ids = torch.cat([torch.full((count,), e, dtype=torch.int32) for e, count in enumerate(rows)])
    pairs = call["expert_ids"].numel()
    ids = torch.cat((ids, SKIPPED.repeat(pairs)[: pairs - len(ids)]))
    call["expert_ids"] = ids[torch.randperm(pairs)].view_as(call["expert_ids"])
    call["weights"][(call["expert_ids"] < 0) | (call["expert_ids"] >= len(rows))] = torch.nan
    unused = torch.tensor(rows) == 0
    call["w13"][unused], call["w2"][unused] = torch.nan, torch.nan
    return call


def check(out: torch.Tensor, call: dict) -> None:
    """Compare with a float64 loop over tokens and slots."""
    exact = oracle.expert_mlp(**{name: oracle.f64(value) for name, value in call.items()})
    plain = peer.expert_mlp(**{name: value.cpu() for name, value in call.items()})
    assert_close(out, plain, torch.from_numpy(exact), "expert_mlp")


def every_expert_on_every_token(x, w13, w2, weights, expert_ids):
    """Return expert_mlp by plain differentiable torch, weighted by a one-hot of the slots."""
    gate, up = torch.einsum("th,efh->tef", x, w13).chunk(2, -1)
    down = torch.einsum("tef,ehf->teh", torch.nn.functional.silu(gate) * up, w2)
    chosen = expert_ids[..., None] == torch.arange(len(w13), device=x.device)
    share = torch.where(chosen, weights[..., None], 0.0).sum(1)
    return torch.einsum("te,teh->th", share, down)

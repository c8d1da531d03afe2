"""Random arguments of a mixture of experts."""

import torch


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

"""Experts by torch's grouped products, as transformers 5 does them by default."""

import torch
from torch.nn import functional

NAME = "grouped_mm"


def missing(device: str) -> str | None:
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} lacks it"
    return None


def expert_mlp(shape, dtype, device):
    """Timed with the sort of the tokens by expert, which belongs to each call."""

    def run(x, w13, w2, weights, expert_ids):
        order = expert_ids.flatten().argsort()
        ends = torch.bincount(expert_ids.flatten(), minlength=len(w13)).cumsum(0).int()
        rows = x[order // expert_ids.shape[1]]
        gate, up = functional.grouped_mm(rows, w13.mT, offs=ends).chunk(2, -1)
        down = functional.grouped_mm(functional.silu(gate) * up, w2.mT, offs=ends)
        weighted = torch.empty_like(down)
        weighted[order] = down * weights.flatten()[order, None].to(x.dtype)
        return weighted.view(*expert_ids.shape, -1).sum(1)

    return run

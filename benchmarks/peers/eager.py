"""The ops as one writes them in torch, without a package of kernels; every call is timed whole."""

import torch
from torch import Tensor
from torch.nn import functional

NAME = "torch"


def missing(device: str) -> str | None:
    return None


def rms_norm(shape, dtype, device):
    """torch's own fused norm. `shape` is (tokens, hidden), eps an input."""
    return lambda x, weight, eps: functional.rms_norm(x, (shape.hidden,), weight, eps)


def add_rms_norm(shape, dtype, device):
    def run(x, residual, weight, eps):
        return functional.rms_norm(x + residual, (shape.hidden,), weight, eps)

    return run


def rope_(shape, dtype, device):
    """The formula on pairs, written back in place as rope_ does; returns k."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
        pairs = x.unflatten(-1, (-1, 2)).float()
        a, b = pairs.unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        x.copy_(torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2))

    def run(q, k, cos, sin, positions, forms):
        rows = positions.long()
        rotate(q, cos[rows], sin[rows])
        rotate(k, cos[rows], sin[rows])
        return k

    return run


def silu_mul(shape, dtype, device):
    def run(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    return run


def linear(shape, dtype, device):
    return functional.linear


def linear_low_bit(shape, dtype, device):
    """The product with the weight in full."""
    return lambda x, qweight, scales, zeros, perm, dense, pack: functional.linear(x, dense)


def expert_mlp(shape, dtype, device):
    """The eager loop over the experts that have tokens."""

    def loop(x, w13, w2, weights, expert_ids):
        out = torch.zeros_like(x)
        for expert in expert_ids.unique().tolist():
            tokens, slots = (expert_ids == expert).nonzero(as_tuple=True)
            gate, up = functional.linear(x[tokens], w13[expert]).chunk(2, -1)
            down = functional.linear(functional.silu(gate) * up, w2[expert])
            out.index_add_(0, tokens, down * weights[tokens, slots, None].to(x.dtype))
        return out

    return {"loop": loop}


def route_experts(shape, dtype, device):
    return lambda logits: logits.topk(shape.top_k)[0].float().softmax(-1)


def store_kv_(shape, dtype, device):
    """Writes by index; returns the cache of values."""

    def run(k, v, k_cache, v_cache, table, cu_seqlens, context_lens):
        page_size = k_cache.shape[1]
        positions = context_lens[:, None] + torch.arange(shape.chunk, device=device)
        slots = positions % shape.window
        page = table.gather(1, slots // page_size).flatten().long()
        k_cache[page, (slots % page_size).flatten()] = k
        v_cache[page, (slots % page_size).flatten()] = v
        return v_cache

    return run

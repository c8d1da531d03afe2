"""torch's varlen_attn, a flash attention; signature of torch 2.13."""

import inspect

import torch

NAME = "varlen_attn"


def missing(device: str) -> str | None:
    if device != "cuda":
        return "needs CUDA"
    from torch.nn.attention import varlen

    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen.varlen_attn).parameters):
        return f"torch {torch.__version__} has it without a window"
    return None


def prefill_attention(shape, dtype, device):
    if dtype == torch.float32:
        return "takes no float32"
    from torch.nn.attention import varlen

    ends = torch.tensor([0, shape.tokens], dtype=torch.int32, device=device)
    call = (ends, ends, shape.tokens, shape.tokens)
    # Keys before and behind a query; -1: all.
    sides = (-1 if shape.window is None else shape.window - 1, 0)

    def run(q, k, v):
        return varlen.varlen_attn(q, k, v, *call, window_size=sides, enable_gqa=True)

    return run

"""How far a result may lie from float64: the numbers behind `mistral-kernels verify` and the tests.

float32 logits have one limit for each backend. bf16 and fp16 have no fixed limit, because their
error depends on the shape: a result passes if it is nearly as good as the same maths done by torch
in that dtype (`low_precision_limit`). Both are compared with float64, never with each other.
"""

import math
from typing import NamedTuple

import torch

# Largest error of float32 logits. Triton and CUDA sum in tiles, so they get twice the room.
FP32_LOGITS = {"reference": 5e-5, "cpu": 5e-5, "triton": 1e-4, "cuda": 1e-4}

# bf16 and fp16, in units of the error that torch makes in that dtype.
MAX_RATIO = 2.0
MEAN_RATIO = 1.5
# Added to the largest error, so that a peer that happens to be exact (one key, zeros) can be met.
MAX_FLOOR = 1e-5


class Error(NamedTuple):
    """Largest and mean absolute difference, or the limits of the two."""

    max: float
    mean: float

    def within(self, limit: "Error") -> bool:
        """Tell whether both figures are at most those of `limit` (never true of a NaN)."""
        return self.max <= limit.max and self.mean <= limit.mean


def error(out: torch.Tensor, exact: torch.Tensor) -> Error:
    """Return the absolute difference of two tensors of one shape, taken in float64.

    Args:
        out: the result to judge, any shape and dtype.
        exact: what it should be, same shape, usually float64.

    Returns:
        The largest and the mean difference; (0, 0) for no elements. Equal infinities differ by 0; a
        NaN or an infinity on one side only counts as infinite.

    Raises:
        ValueError: the shapes differ.
    """
    if out.shape != exact.shape:
        raise ValueError(f"error: expected shape {tuple(exact.shape)}, got {tuple(out.shape)}")
    if out.numel() == 0:
        return Error(0.0, 0.0)
    out, exact = out.detach().cpu().double(), exact.detach().cpu().double()
    gap = torch.where(out == exact, 0.0, (out - exact).abs()).nan_to_num(nan=math.inf)
    return Error(gap.max().item(), gap.mean().item())


def fp32_limit(backend: str) -> Error:
    """Return the limit for float32 logits made by `backend`.

    Raises:
        ValueError: `backend` is none that the table knows.
    """
    if backend not in FP32_LOGITS:
        raise ValueError(f"fp32_limit: expected backend in {list(FP32_LOGITS)}, got {backend!r}")
    limit = FP32_LOGITS[backend]
    return Error(limit, limit)


def low_precision_limit(peer: Error) -> Error:
    """Return the limit for a bf16 or fp16 result, given the error of torch in that dtype."""
    return Error(MAX_RATIO * peer.max + MAX_FLOOR, MEAN_RATIO * peer.mean)

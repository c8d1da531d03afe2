"""Scales of symmetric codes that a search finds better than the largest value of a group.

With the largest value at the end of the codes all others are rounded on a coarse grid. A smaller
scale clips it and rounds the rest finer; which of the two costs less is tried for every group.
"""

import torch
from torch import Tensor

from mistral_kernels.ops.low_bit import HALF_SPAN, nearest_values

# Of half the codes' span. 1.07 lets 4 bits, -8 .. 7, reach the largest value on the short side too.
FACTORS = (1.07, *(1.0 - 0.04 * step for step in range(10)))
CHUNK = 1 << 18  # weights tried at a time: their copies stay in a processor's cache


def search_scales(
    weight: Tensor,
    kind: torch.dtype,
    group_size: int | None,
    dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Tensor:
    """For each group the scale whose nearest codes have the smallest squared error.

    Args:
        weight: (out, in), float32.
        kind: INT4, INT8 or FP8.
        group_size: a divisor of `in`; None: the whole row.
        dtype: of the scales; errors are those of scales so rounded.
        importance: (in,), float32, of the squared error of each column; None: all count alike.

    Returns:
        (out, in / group_size), `dtype`.
    """
    size = group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    weigh = None if importance is None else importance.view(-1, size)
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    found = [_search(chunk, kind, dtype, weigh) for chunk in groups.split(rows)]
    return torch.cat(found)


def _search(
    groups: Tensor, kind: torch.dtype, dtype: torch.dtype, importance: Tensor | None
) -> Tensor:
    largest = groups.abs().amax(-1) / HALF_SPAN[kind]
    best = least = None
    for factor in FACTORS:
        scales = (largest * factor).to(dtype)
        errors = nearest_values(groups, scales[..., None], kind).sub_(groups).square_()
        error = (errors if importance is None else errors.mul_(importance)).sum(-1)
        if best is None:
            best, least = scales, error
        else:
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best

"""Rounds a weight for its inputs, so that what comes out of it is what came out before.

X are the inputs that a weight W had in the model as it was, Y those that it has behind all that is
rounded already, H = Y^T Y. First the weight makes up for what has become of its inputs:

    W' = W + (W (X - Y)^T + E^T) Y (H + damping)^-1,

the least squares fit of Y W'^T to X W^T + E, where E is what the residual stream, to which the
output is added, has lost before. The fit is held back where there are few texts, so that it is to
their language rather than to them. Then the weight is rounded column by column. If column j is off
by e, the best that the later columns can do about it is to change by -e U[j, later] / U[j, j],
where H^-1 = U^T U and U is upper triangular.

Columns with large inputs go first, while many others are left to make up for them; their groups are
those of the weight's own order, so that the result needs no permutation. Where there were few
inputs, as for an expert that hardly any token went to, the damping of H outweighs them, and the
rounding is that to nearest.

Source: Frantar et al. 2022, arXiv 2210.17323 (GPTQ), algorithm 1; Li et al. 2025, arXiv 2504.02692
(GPTAQ), for the inputs as they were.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from mistral_kernels.model.scale_search import search_scales
from mistral_kernels.ops.low_bit import LowBit, nearest_values, round_to_codes

# Of the mean of H's diagonal, added to it: H of few tokens has no inverse. The embedded model's
# divergence on texts that it wrote itself is 0.0316 nats with 0.01, 0.0305 with 0.1, 0.0303 with
# 0.2, calibrated with 512 others.
DAMPING = 0.1
STILL_ROWS = 4096  # the same for W', in rows: as if so many more inputs had come and not changed
BLOCK = 128  # columns whose errors reach the later ones by one matrix product


class Inputs:
    """The inputs of some weights, and what is computed of them when it is first asked for.

    Args:
        chunks: gives the inputs as they are and as they were, (rows, in) float32 each, and what
            the outputs should have besides, (rows, out), where that is not nothing.
    """

    def __init__(self, chunks: Callable[[], Iterable[tuple[Tensor, ...]]]):
        self._chunks = chunks

    @cached_property
    def _sums(self) -> tuple[int, Tensor, Tensor, Tensor | float]:
        """The rows, and added chunk by chunk in their order Y^T Y, (X - Y)^T Y, E^T Y."""
        rows, gram, drift, owed = 0, 0.0, 0.0, 0.0
        for inputs, before, *missing in self._chunks():
            rows += len(inputs)
            gram = gram + inputs.T @ inputs
            drift = drift + (before - inputs).T @ inputs
            owed = owed + missing[0].T @ inputs if missing else owed
        return rows, gram, drift, owed

    def damped(self, damping: float) -> Tensor:
        """H with so much of the mean of its diagonal added to that, (in, in)."""
        gram = self._sums[1].clone()
        # Without any input the weights are free: they are rounded to nearest.
        gram.diagonal().add_(damping * (gram.diagonal().mean().item() or 1.0))
        return gram

    def fit(self, weight: Tensor) -> Tensor:
        """W' for a weight W, (out, in)."""
        rows, _, drift, owed = self._sums
        damped = self.damped(STILL_ROWS / max(rows, 1))
        return weight + torch.linalg.solve(damped, weight @ drift + owed, left=False)

    @cached_property
    def importance(self) -> Tensor:
        """What an error of a column costs, (in,)."""
        return self.damped(DAMPING).diagonal()

    @cached_property
    def order(self) -> Tensor:
        """The columns, (in,), from the largest input to the smallest."""
        return self.importance.argsort(descending=True, stable=True)

    @cached_property
    def factor(self) -> Tensor:
        """U of H in that order, (in, in)."""
        return inverse_factor(self.damped(DAMPING)[self.order][:, self.order])


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with gram^-1 = U^T U.

    Flipped in both directions, the Cholesky factor of the flipped matrix is an upper triangular R
    with gram = R R^T, and U is its inverse: one factorisation, and the condition is not squared.
    """
    flipped = gram.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    while failed.item():  # rounding has left it indefinite
        flipped.diagonal().mul_(1.01)
        lower, failed = torch.linalg.cholesky_ex(flipped)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def quantise_compensated(
    weight: Tensor, kind: torch.dtype, group_size: int | None, dtype: torch.dtype, inputs: Inputs
) -> LowBit:
    """Rounds a weight so that its product with the given inputs changes little.

    Args:
        weight: (out, in), float32.
        kind: INT4, INT8 or FP8.
        group_size: a divisor of `in`; None: the whole row.
        dtype: of the scales.
        inputs: of this weight.

    Returns:
        The weight in the layout, without zeros and perm.
    """
    weight = inputs.fit(weight)
    scales = search_scales(weight, kind, group_size, dtype, inputs.importance)
    values = compensate(weight, scales, kind, inputs.order, inputs.factor)
    return round_to_codes(values, scales, None, kind)


def compensate(
    weight: Tensor, scales: Tensor, kind: torch.dtype, order: Tensor, factor: Tensor
) -> Tensor:
    """Rounds column by column, each error made up for by the columns after it.

    Args:
        weight: (out, in), float32.
        scales: (out, in / group_size).
        kind: INT4, INT8 or FP8.
        order: (in,), the columns in the order in which they are rounded.
        factor: (in, in), float32, U in that order.

    Returns:
        The rounded weight, (out, in), float32.
    """
    # One column a row: a column is then contiguous.
    left = weight[:, order].T.contiguous()
    by_column = scales.T.float().repeat_interleave(len(left) // scales.shape[1], 0)[order]
    rounded = torch.empty_like(left)
    for begin in range(0, len(left), BLOCK):
        block, after = slice(begin, begin + BLOCK), slice(begin + BLOCK, None)
        errors = torch.empty_like(left[block])
        corner = factor[block, block]
        for i, column in enumerate(left[block]):
            rounded[begin + i] = nearest_values(column, by_column[begin + i], kind)
            errors[i] = (column - rounded[begin + i]) / corner[i, i]
            left[block][i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        left[after].addmm_(factor[block, after].T, errors, alpha=-1)
    values = torch.empty_like(weight)
    values[:, order] = rounded.T
    return values

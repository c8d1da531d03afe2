"""Rounds a weight column by column, the columns not yet rounded making up for each error.

With the inputs X of a layer, the error of its output is |X dW^T|^2 = sum over rows of dW H dW^T,
H = X^T X. If column j is off by e, the best that the later columns can do about it is to change by
-e * U[j, later] / U[j, j], where H^-1 = U^T U and U is upper triangular.

Columns with large inputs go first, while many others are left to make up for them; their groups are
those of the weight's own order, so that the result needs no permutation.

Source: Frantar et al. 2022, arXiv 2210.17323 (GPTQ), algorithm 1.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from mistral_kernels.model.scale_search import search_scales
from mistral_kernels.ops.low_bit import LowBit, nearest_values, round_to_codes

DAMPING = 0.01  # of the mean of H's diagonal, added to it: H of few tokens has no inverse
BLOCK = 128  # columns whose errors reach the later ones by one matrix product


class Inputs:
    """The inputs of some weights, and their H, which is computed when it is first asked for.

    Args:
        chunks: returns the inputs, (rows, in) float32 each; called once at most.
    """

    def __init__(self, chunks: Callable[[], Iterable[Tensor]]):
        self._chunks = chunks

    @cached_property
    def gram(self) -> Tensor:
        """H = X^T X, (in, in) float32, added chunk by chunk in their order."""
        total = None
        for x in self._chunks():
            total = x.T @ x if total is None else total.addmm_(x.T, x)
        return total

    @cached_property
    def order(self) -> Tensor:
        """(in,), the columns from the largest input to the smallest."""
        return self.gram.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def factor(self) -> Tensor:
        """(in, in), float32, U of H in that order."""
        # A column without any input is free to take any value.
        mean = self.gram.diagonal().mean().item() or 1.0
        return _inverse_factor(self.gram[self.order][:, self.order], DAMPING * mean)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular U with (gram + damping)^-1 = U^T U.

    Flipped in both directions the Cholesky factor of the flipped matrix is upper triangular, R with
    gram = R R^T, and U is its inverse: one factorisation, and the condition is not squared.
    """
    flipped = gram.flip(0, 1)
    while True:
        flipped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed.item():
            break
        damping *= 10  # rounding left it indefinite
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
    scales = search_scales(weight, kind, group_size, dtype, inputs.gram.diagonal())
    order, factor = inputs.order, inputs.factor
    # One column a row: a column is then contiguous.
    left = weight[:, order].T.contiguous()
    by_column = scales.T.float().repeat_interleave(group_size or len(left), 0)[order]
    rounded = torch.empty_like(left)
    for begin in range(0, len(left), BLOCK):
        block = slice(begin, begin + BLOCK)
        errors = torch.zeros_like(left[block])
        corner = factor[block, block]
        for i, column in enumerate(left[block]):
            rounded[begin + i] = nearest_values(column, by_column[begin + i], kind)
            errors[i] = (column - rounded[begin + i]) / corner[i, i]
            left[begin + i + 1 : begin + len(corner)] -= corner[i, i + 1 :, None] * errors[i]
        left[begin + BLOCK :] -= factor[block, begin + BLOCK :].T @ errors
    values = torch.empty_like(weight)
    values[:, order] = rounded.T
    return round_to_codes(values, scales, None, kind)

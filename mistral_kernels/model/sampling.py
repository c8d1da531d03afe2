"""From logits to tokens: greedy, or temperature, then top-k, then top-p, then one uniform draw.

A draw is a function of (seed, step) alone, from the counter-based Philox generator: no state is
kept, so a sequence's draws depend neither on its neighbours nor on what was drawn before.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Holtzman et al. 2019,
arXiv 1904.09751 (top-p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How tokens are drawn; the fields are those of `sample`."""

    temperature: float
    top_k: int | None
    top_p: float


def uniform_draws(seed: int, step: int, count: int) -> list[float]:
    """The numbers in [0, 1) that a sequence's steps from `step` on draw, one each.

    A step's is the first that the generator gives with the step for its counter. To make the
    generator takes 30 us, a number 0.1 (Xeon at 2.5 GHz, 2026-11-23): ask for many.
    """
    # A counter stands for four numbers of 64 bits; a float64 has 53.
    first_of_four = np.random.Philox(key=seed, counter=step).random_raw(4 * count)[::4]
    return ((first_of_four >> np.uint64(11)) * 2.0**-53).tolist()


def sample(
    logits: Tensor,
    draws: Sequence[float] | Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """One token a row. Given `draws` on the logits' device, nothing waits for that.

    The probabilities that are kept are laid end to end, by id, and the draw falls on one of them.

    Args:
        logits: (rows, vocab), floating point.
        draws: a number in [0, 1) for each row, as a tensor float64; unused when temperature is 0.
        temperature: divides the logits; 0 takes the largest, the lowest id among equals.
        top_k: keep the k largest; None for all.
        top_p: then keep the fewest of the largest whose probabilities reach top_p.

    Returns:
        (rows,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # float64, so that a sum over a large vocabulary still resolves the draw.
    scaled = logits.double() - logits.amax(-1, keepdim=True)  # first, so that nothing overflows
    probabilities = torch.softmax(scaled / temperature, -1)
    if top_k is not None or top_p < 1:
        probabilities = probabilities * _kept(probabilities, top_k, top_p)
    totals = probabilities.cumsum(-1)
    points = torch.as_tensor(draws, dtype=torch.float64, device=logits.device) * totals[:, -1]
    # Less than the last total, since a draw is less than 1. Of a row of NaN there is no such place.
    chosen = torch.searchsorted(totals, points[:, None], right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[1] - 1)


def _kept(probabilities: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Which of (rows, vocab) may be drawn; of equals the lowest ids."""
    if top_k is None:  # of 32768, 3 to 7 ms on one core (Xeon at 2.5 GHz, 2026-11-23)
        largest = probabilities.sort(-1, descending=True).values
    else:  # 50 of them: 0.1 ms
        largest = probabilities.topk(min(top_k, probabilities.shape[1])).values
    # One stays if those before it do not reach top_p yet. The first always does, but for NaN.
    reached = largest.cumsum(-1)
    wanted = (reached - largest < top_p * reached[:, -1:]).sum(-1, keepdim=True).clamp_(min=1)
    smallest = largest.gather(-1, wanted - 1)
    above, equal = probabilities > smallest, probabilities == smallest
    return above | equal & (equal.cumsum(-1) <= wanted - above.sum(-1, keepdim=True))


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], unscaled: (rows, vocab) and (rows,) to (rows,)."""
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, None].long()).squeeze(-1)

"""Which experts a run chose, for `mistral_kernels.verify`: recorded, replayed and judged.

Two logits of a router that nearly tie may change places when they are rounded; the token then goes
to another expert, and its output is another one, though no arithmetic was worse. So the float64 run
that a bf16 or fp16 run is compared with takes over its choices, and the choices are judged apart:
each must be float64's own, or tie with it as nearly as rounding explains.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels import Transformer
from mistral_kernels.tolerance import error, low_precision_limit


class Route(NamedTuple):
    """What the router of one layer made of each token."""

    logits: Tensor  # (tokens, experts)
    expert_ids: Tensor  # (tokens, top_k)


@contextlib.contextmanager
def recorded(model: Transformer, replay: Sequence[Route] = ()) -> Iterator[list[Route]]:
    """Yield a list to which every call of a router of `model` adds its route.

    Args:
        model: on the backend that it is to run; of a dense one the list stays empty.
        replay: routes whose experts the routers take instead of their own, one a call. The weights
            are those of the logits at hand. An id out of range becomes the nearest one in range.
    """
    routes, replayed = [], iter(replay)
    kernels = model.layers[0].kernels  # one dict, shared by all layers
    if (route_experts := kernels.get("route_experts")) is None:
        yield routes
        return

    def route(logits: Tensor, top_k: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        if replay:
            expert_ids = next(replayed).expert_ids.clamp(0, logits.shape[1] - 1)
            weights = logits.gather(1, expert_ids.long()).softmax(-1)
        else:
            weights, expert_ids = route_experts(logits, top_k, positions)
        routes.append(Route(logits, expert_ids))
        return weights, expert_ids

    kernels["route_experts"] = route
    try:
        yield routes
    finally:
        kernels["route_experts"] = route_experts


def same_choices(routes: Sequence[Route], others: Sequence[Route]) -> bool:
    """Tell whether two runs sent every token to the same experts in all layers."""
    return all(
        torch.equal(route.expert_ids, other.expert_ids)
        for route, other in zip(routes, others, strict=True)
    )


def widest_gap(replayed: Route) -> float:
    """Return by how much any token's best expert left out beats its worst chosen, by its logits.

    At most 0 where all choices are those of the logits; infinite if a token has an expert twice.
    """
    logits, expert_ids = replayed.logits, replayed.expert_ids.long()
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, expert_ids, True)
    best_left_out = logits.masked_fill(chosen, -math.inf).amax(1)
    gap = best_left_out - logits.gather(1, expert_ids).amin(1)
    twice = chosen.sum(1) < expert_ids.shape[1]
    return gap.masked_fill(twice, math.inf).max().item()


def gap_limit(peer: Route, exact: Route) -> float:
    """Return the widest gap that rounding explains, given torch's logits and float64's.

    Two logits change places only if their errors together bridge the gap between them.
    """
    return 2 * low_precision_limit(error(peer.logits, exact.logits)).max

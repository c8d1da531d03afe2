"""The rotary tables of a model: cosines, sines, and Llama 4's query scale, one row a position.

Frequencies are theta ** (-2i / head_dim). YaRN divides the slow ones by `factor`, keeps the fast
ones, and ramps between; they are told apart by how often they turn over the original context.
Everything is computed in float64 and rounded once: at position 30,000 an angle in float32 is off by
2e-3.

Source: Su et al. 2021, arXiv 2104.09864; Peng et al. 2023, arXiv 2309.00071 (YaRN).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.config import ModelConfig, Yarn


class RopeTables(NamedTuple):
    cos: Tensor  # (max_positions, head_dim / 2), float32 (float64 for a float64 model)
    sin: Tensor  # the same
    q_scale: Tensor | None  # (max_positions,)


def _yarn_frequencies(frequencies: Tensor, yarn: Yarn, head_dim: int, theta: float) -> Tensor:
    def dimension_of(turns: float) -> float:
        wavelength = yarn.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # a step instead of a ramp of width 0
    ramp = ((torch.arange(len(frequencies), device="cpu").double() - low) / width).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / yarn.factor * ramp


def rope_tables(
    config: ModelConfig, max_positions: int, device: torch.device, dtype: torch.dtype
) -> RopeTables:
    """Tables for positions 0..max_positions-1 on `device`, as `dtype` (float32 or float64)."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").double() / config.head_dim
    frequencies = config.rope_theta**-exponents
    factor = 1.0
    if config.yarn is not None:
        frequencies = _yarn_frequencies(
            frequencies, config.yarn, config.head_dim, config.rope_theta
        )
        factor = config.yarn.attention_factor
    positions = torch.arange(max_positions, device="cpu").double()
    angles = positions[:, None] * frequencies
    q_scale = None
    if config.q_scale is not None:
        turns = torch.floor(positions / config.q_scale.original_max_positions)
        q_scale = (1 + config.q_scale.beta * torch.log1p(turns)).to(device, dtype)
    cos, sin = (table.mul(factor).to(device, dtype) for table in (angles.cos(), angles.sin()))
    return RopeTables(cos, sin, q_scale)

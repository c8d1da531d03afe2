"""A whole model in float64 and plain loops, put together from the oracle's ops.

It shares with the package only the fields of its configuration: the rotary tables are computed here
once more, one frequency at a time.
"""

import math

import numpy as np
import oracle
import torch
from torch import Tensor

from mistral_kernels.model.config import ModelConfig


def frequency(config: ModelConfig, pair: int) -> float:
    """How far one position turns a pair, in radians; YaRN slows the pairs that turn rarely."""
    plain = config.rope_theta ** (-2 * pair / config.head_dim)
    yarn = config.yarn
    if yarn is None:
        return plain

    def pair_that_makes(turns: float) -> float:
        wavelength = yarn.original_max_positions / turns
        return (
            config.head_dim * math.log(wavelength / (2 * math.pi)) / 2 / math.log(config.rope_theta)
        )

    low = max(math.floor(pair_that_makes(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_makes(yarn.beta_slow)), config.head_dim - 1)
    slowed = min(max((pair - low) / max(high - low, 1e-3), 0), 1)
    return plain * (1 - slowed) + plain / yarn.factor * slowed


def rope_tables(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """cos and sin (length, head_dim / 2), and the factor of the queries (length,)."""
    scale = config.yarn.attention_factor if config.yarn else 1.0
    turns = [frequency(config, pair) for pair in range(config.head_dim // 2)]
    angles = np.outer(np.arange(length), turns)
    q_scale = np.ones(length)
    if config.q_scale is not None:
        for p in range(length):
            wraps = p // config.q_scale.original_max_positions
            q_scale[p] = 1 + config.q_scale.beta * math.log(1 + wraps)
    return scale * np.cos(angles), scale * np.sin(angles), q_scale


def logits(tensors: dict[str, Tensor], config: ModelConfig, tokens: list[int]) -> Tensor:
    """The logits of every position of one sequence.

    Args:
        tensors: the weights under native keys.
        config: the model.
        tokens: the sequence.

    Returns:
        (tokens, vocab), float64.
    """
    get = {key.removesuffix(".weight"): oracle.f64(tensor) for key, tensor in tensors.items()}
    positions = list(range(len(tokens)))
    cos, sin, q_scale = rope_tables(config, len(tokens))

    def heads(x: np.ndarray, weight: str) -> np.ndarray:
        return (x @ get[weight].T).reshape(len(tokens), -1, config.head_dim)

    x = get["tok_embeddings"][tokens]
    for n, window in enumerate(config.windows):
        layer = f"layers.{n}"
        normed = oracle.rms_norm(x, get[f"{layer}.attention_norm"], config.norm_eps)
        q, k, v = (heads(normed, f"{layer}.attention.w{part}") for part in "qkv")
        q = oracle.rope(q, cos, sin, positions, interleaved=True, q_scale=q_scale)
        k = oracle.rope(k, cos, sin, positions, interleaved=True)
        out, _ = oracle.attention(q, k, v, positions, positions, window=window)
        x = x + out.reshape(len(tokens), -1) @ get[f"{layer}.attention.wo"].T
        normed = oracle.rms_norm(x, get[f"{layer}.ffn_norm"], config.norm_eps)
        x = x + feed_forward(normed, get, f"{layer}.feed_forward", config)
    x = oracle.rms_norm(x, get["norm"], config.norm_eps)
    output = get["tok_embeddings" if config.tied_embeddings else "output"]
    return torch.from_numpy(x @ output.T)


def feed_forward(
    x: np.ndarray, get: dict[str, np.ndarray], name: str, config: ModelConfig
) -> np.ndarray:
    """The experts of a layer; a dense layer is one expert that every token is sent to."""
    owners = [f"{name}.experts.{e}" for e in range(config.experts)] or [name]
    w13 = np.stack([np.concatenate((get[f"{o}.w1"], get[f"{o}.w3"])) for o in owners])
    w2 = np.stack([get[f"{o}.w2"] for o in owners])
    weights, expert_ids = np.ones((len(x), 1)), np.zeros((len(x), 1), int)
    if config.experts:
        weights, expert_ids = oracle.route_experts(x @ get[f"{name}.gate"].T, config.top_k)
    return oracle.expert_mlp(x, w13, w2, weights, expert_ids)

"""Rotary tables against transformers' frequencies, and the exactness that they are built for."""

import math

import pytest
import torch
from checkpoints import tiny_config
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mistral_kernels.model.config import ModelConfig, QueryScale, Yarn
from mistral_kernels.model.rope_tables import rope_tables


def tables(config: ModelConfig, positions: int = 64, dtype: torch.dtype = torch.float64):
    return rope_tables(config, positions, torch.device("cpu"), dtype)


def test_plain_frequencies():
    cos, sin, q_scale = tables(tiny_config(head_dim=8, rope_theta=100.0))
    assert cos.shape == sin.shape == (64, 4) and q_scale is None
    for i in range(4):
        angle = 7 * 100.0 ** (-2 * i / 8)
        assert cos[7, i].item() == pytest.approx(math.cos(angle), abs=1e-15)
        assert sin[7, i].item() == pytest.approx(math.sin(angle), abs=1e-15)


def test_float32_tables_are_rounded_once():
    config = tiny_config(head_dim=16, rope_theta=1e4)
    exact, rounded = tables(config, 40000), tables(config, 40000, torch.float32)
    assert rounded.cos.dtype == torch.float32
    assert rounded.cos.equal(exact.cos.float()) and rounded.sin.equal(exact.sin.float())


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("factor", "original", "fast", "slow", "theta", "head_dim"),
    [
        (16.0, 16384, 32.0, 1.0, 1e6, 128),
        (48.0, 8192, 32.0, 1.0, 1e8, 128),
        (4.0, 16, 2.0, 0.25, 1e6, 16),
        (2.0, 4096, 32.0, 32.0, 1e4, 32),
    ],
)
def test_yarn_frequencies_are_transformers(factor, original, fast, slow, theta, head_dim, truncate):
    scaling = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "truncate": truncate,
    }
    config = Ministral3Config(head_dim=head_dim, rope_parameters=scaling)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    yarn = Yarn(factor, original, fast, slow, attention_factor, truncate)
    cos, _, _ = tables(tiny_config(head_dim=head_dim, rope_theta=theta, yarn=yarn))
    expected = torch.cos(5 * frequencies.double()) * attention_factor
    assert (cos[5] - expected).abs().max() < 2e-6  # theirs are float32


def test_attention_factor_scales_both_tables():
    yarn = Yarn(4.0, 16, 2.0, 0.25, attention_factor=1.25)
    cos, sin, _ = tables(tiny_config(yarn=yarn))
    assert torch.allclose(cos.square() + sin.square(), torch.tensor(1.25**2).double())


def test_query_scale():
    config = tiny_config(q_scale=QueryScale(beta=0.1, original_max_positions=16))
    q_scale = tables(config).q_scale
    assert q_scale[15] == 1.0
    for position in (16, 31, 32, 63):
        expected = 1 + 0.1 * math.log(1 + position // 16)
        assert q_scale[position].item() == pytest.approx(expected, abs=1e-15)

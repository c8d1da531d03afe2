"""Miniatures of the published models: their structure in small sizes, in the form of the hub."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
from safetensors.torch import save_file
from torch import Tensor

from mistral_kernels.model.config import ModelConfig

HEAD_DIM, KV_HEADS, WINDOW, ORIGINAL = 8, 2, 6, 8
# Which models are published with a vision part, and as what.
WRAPPERS = {
    "pixtral-": ("llava", "LlavaForConditionalGeneration"),
    "mistral-small-3.": ("mistral3", "Mistral3ForConditionalGeneration"),
    "ministral-3-": ("mistral3", "Mistral3ForConditionalGeneration"),
    "devstral-small-2-": ("mistral3", "Mistral3ForConditionalGeneration"),
}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def miniature(config: ModelConfig) -> ModelConfig:
    """A model of the same structure: groups, width against heads, windows, rope, experts, ties.

    YaRN's bounds shrink with its original positions, so that it slows the same share of the pairs.
    """
    yarn, q_scale = config.yarn, config.q_scale
    if yarn:
        shrink = ORIGINAL / yarn.original_max_positions
        yarn = replace(
            yarn,
            original_max_positions=ORIGINAL,
            beta_fast=yarn.beta_fast * shrink,
            beta_slow=yarn.beta_slow * shrink,
        )
    if q_scale:
        q_scale = replace(q_scale, original_max_positions=ORIGINAL)
    windows = config.windows[: 4 if None in config.windows and any(config.windows) else 2]
    group = config.q_heads // config.kv_heads
    return replace(
        config,
        hidden=config.hidden * KV_HEADS * HEAD_DIM // (config.kv_heads * config.head_dim),
        layers=len(windows),
        q_heads=group * KV_HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        ffn_dim=config.ffn_dim // 256,
        vocab=48,
        windows=tuple(window and WINDOW for window in windows),
        yarn=yarn,
        q_scale=q_scale,
    )


def hub_config(name: str, config: ModelConfig) -> dict[str, Any]:
    """A `config.json` in the form in which the model of that name is published."""
    text = checkpoints.huggingface_config(config)
    rope, kinds = text.pop("rope_parameters"), text.pop("layer_types")
    if config.yarn:  # from transformers 5
        # Whether cos and sin are scaled is said by these two, see YaRN in transformers.
        mscale_all_dim = 1.0 if rope.pop("attention_factor") == 1.0 else 0.0
        text["rope_parameters"] = rope | {"mscale": 1.0, "mscale_all_dim": mscale_all_dim}
    else:  # from transformers 4
        text["rope_theta"] = rope["rope_theta"]
    if len(set(kinds)) == 2:
        text["layer_types"] = kinds
    elif text["model_type"] == "ministral":
        text |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    for beginning, (model_type, architecture) in WRAPPERS.items():
        if name.startswith(beginning):
            if not config.tied_embeddings:
                del text["tie_word_embeddings"]
            wrapper = {"architectures": [architecture], "model_type": model_type}
            return wrapper | {"text_config": text, "vision_config": VISION}
    return text


def write_hub_form(
    folder: Path, name: str, config: ModelConfig, tensors: dict[str, Tensor]
) -> None:
    """Writes a Hugging Face checkpoint as the model of that name is published.

    Args:
        folder: where; made if absent.
        name: the published model.
        config: its miniature.
        tensors: the weights under native keys.
    """
    values = hub_config(name, config)
    prefix = "language_model." if "text_config" in values else ""
    renamed = checkpoints.huggingface_tensors(tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(
        {prefix + key: tensor.contiguous() for key, tensor in renamed.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )

"""A ModelConfig as the contents of `params.json` or `config.json`.

What is written here is read back before it is returned: a file that would describe another model
than the one in hand is never made.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.layouts import CONFIG_FILES


def native_params(config: ModelConfig) -> dict[str, Any]:
    """The contents of a `params.json`, with the keys of Mistral's own files.

    Args:
        config: the model, of either rope layout; a `params.json` implies the native one.

    Returns:
        The file's items; keys that would only repeat a default are left out.

    Raises:
        ValueError: such a file cannot express the model; the field is named.
    """
    params: dict[str, Any] = {
        "dim": config.hidden,
        "n_layers": config.layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.ffn_dim,
        "n_heads": config.q_heads,
        "n_kv_heads": config.kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab,
        "rope_theta": config.rope_theta,
    }
    if any(config.windows):
        pattern = _repeated_pattern(config.windows)
        params["sliding_window"] = list(pattern) if pattern[1:] else pattern[0]
    if config.tied_embeddings:
        params["tied_embeddings"] = True
    if config.max_positions is not None:
        params["max_position_embeddings"] = config.max_positions
    if config.experts:
        params["moe"] = {"num_experts": config.experts, "num_experts_per_tok": config.top_k}
    if config.yarn:
        params["yarn"] = {
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_positions,
            "beta": config.yarn.beta_fast,
            "alpha": config.yarn.beta_slow,
            "apply_scale": config.yarn.attention_factor != 1.0,
        }
    if config.q_scale:
        params["llama_4_scaling"] = {
            "beta": config.q_scale.beta,
            "original_max_position_embeddings": config.q_scale.original_max_positions,
        }
    return _read_back(params, config, "native", ModelConfig.from_native)


def huggingface_config(config: ModelConfig, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The contents of a `config.json`, as transformers 5 writes and loads it.

    Args:
        config: the model, of either rope layout; a `config.json` implies Hugging Face's.
        dtype: of the weights beside the file; None leaves the key out.

    Returns:
        The file's items.

    Raises:
        ValueError: such a file cannot express the model; the field is named.
    """
    model_type = _model_type(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    max_positions = config.max_positions
    if config.yarn:
        original = config.yarn.original_max_positions
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": original,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "attention_factor": config.yarn.attention_factor,
            "truncate": config.yarn.truncate,
        }
        # Else the class's own default would stand beside a factor that contradicts it.
        max_positions = max_positions or int(original * config.yarn.factor)
    if model_type == "ministral3":
        rope["llama_4_scaling_beta"] = config.q_scale.beta if config.q_scale else 0.0
    if config.q_scale:
        rope.setdefault("original_max_position_embeddings", config.q_scale.original_max_positions)
    values: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "rope_parameters": rope,
        # For transformers 4, which reads it here and would else take its class's default.
        "rope_theta": config.rope_theta,
        # Written down even where it is null: the classes default to a window of 4096.
        "sliding_window": next(filter(None, config.windows), None),
        "tie_word_embeddings": config.tied_embeddings,
        # Of every published tokenizer; Ministral 3's class would add a padding id of 11.
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if model_type == "ministral":
        kinds = ("full_attention", "sliding_attention")
        values["layer_types"] = [kinds[window is not None] for window in config.windows]
    if max_positions is not None:
        values["max_position_embeddings"] = max_positions
    if config.experts:
        values["num_local_experts"] = config.experts
        values["num_experts_per_tok"] = config.top_k
    if dtype is not None:
        values["dtype"] = str(dtype).removeprefix("torch.")
    return _read_back(values, config, "huggingface", ModelConfig.from_huggingface)


def _model_type(config: ModelConfig) -> str:
    """The class of transformers 5.23 that computes this model; none can do everything."""
    mixed = len(set(config.windows)) > 1
    if config.experts:
        if mixed:
            raise _inexpressible("huggingface", "windows", "mixtral has one for all layers")
        if config.q_scale:
            raise _inexpressible("huggingface", "q_scale", "mixtral scales no queries")
        return "mixtral"
    if mixed and config.q_scale:
        reason = "ministral3, which scales queries, has one window for all layers"
        raise _inexpressible("huggingface", "windows", reason)
    if mixed:
        return "ministral"
    return "ministral3" if config.yarn or config.q_scale else "mistral"


def _repeated_pattern(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shortest run of windows that, repeated, gives them all."""
    layers = len(windows)
    lengths = (n for n in range(1, layers + 1) if layers % n == 0)
    return next(windows[:n] for n in lengths if windows[:n] * (layers // n) == windows)


def _read_back(
    values: dict[str, Any],
    config: ModelConfig,
    layout: str,
    read: Callable[[dict[str, Any]], ModelConfig],
) -> dict[str, Any]:
    """The values themselves, if they say of the model what `config` says."""
    try:
        again = read(values)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILES[layout]} cannot express this model: {error}") from error
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        # max_positions may be unknown here; the file, or transformers' default, then says some.
        free = field.name == "interleaved" or (field.name == "max_positions" and ours is None)
        if not free and ours != theirs:
            raise _inexpressible(layout, field.name, f"{ours} would be read as {theirs}")
    return values


def _inexpressible(layout: str, field: str, reason: str) -> ValueError:
    return ValueError(f"{CONFIG_FILES[layout]} cannot express this model: {field}: {reason}")

"""Tiny random checkpoints for tests, in both layouts.

`write_native` and `write_huggingface` with the same config and seed write the same model: rows of
wq and wk are reordered as the rope layout wants them, all else is renamed. Key names are spelled
out here once more, independently of the package.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_kernels.model.config import ModelConfig

HUGGINGFACE_LEAVES = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
HUGGINGFACE_ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def tiny_config(**changes: Any) -> ModelConfig:
    """A dense model of two layers, 4 / 2 heads of 8 and window 4; `changes` replace fields."""
    fields: dict[str, Any] = {
        "hidden": 24,
        "layers": 2,
        "q_heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 40,
        "vocab": 32,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
    } | changes
    fields.setdefault("windows", (4,) * fields["layers"])
    return ModelConfig(**fields)


def native_tensors(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random weights under native keys; norms are near 1, a matrix keeps the size of its input."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(config.hidden, generator=generator)).to(dtype)

    hidden, q_dim, kv_dim = (
        config.hidden,
        *(heads * config.head_dim for heads in (config.q_heads, config.kv_heads)),
    )
    tensors = {"tok_embeddings.weight": matrix(config.vocab, hidden), "norm.weight": norm()}
    if not config.tied_embeddings:
        tensors["output.weight"] = matrix(config.vocab, hidden)
    for n in range(config.layers):
        attention, ffn = f"layers.{n}.attention", f"layers.{n}.feed_forward"
        tensors[f"{attention}_norm.weight"] = norm()
        tensors[f"layers.{n}.ffn_norm.weight"] = norm()
        tensors[f"{attention}.wq.weight"] = matrix(q_dim, hidden)
        tensors[f"{attention}.wk.weight"] = matrix(kv_dim, hidden)
        tensors[f"{attention}.wv.weight"] = matrix(kv_dim, hidden)
        tensors[f"{attention}.wo.weight"] = matrix(hidden, q_dim)
        if config.experts:
            tensors[f"{ffn}.gate.weight"] = matrix(config.experts, hidden)
        for owner in expert_owners(ffn, config):
            tensors[f"{owner}.w1.weight"] = matrix(config.ffn_dim, hidden)
            tensors[f"{owner}.w2.weight"] = matrix(hidden, config.ffn_dim)
            tensors[f"{owner}.w3.weight"] = matrix(config.ffn_dim, hidden)
    return tensors


def expert_owners(ffn: str, config: ModelConfig) -> list[str]:
    """The keys under which w1, w2 and w3 of a layer stand."""
    return [f"{ffn}.experts.{e}" for e in range(config.experts)] or [ffn]


def huggingface_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Native tensors under Hugging Face keys, wq and wk with half-split rows."""
    renamed = {}
    for key, tensor in tensors.items():
        if key in HUGGINGFACE_ENDS:
            renamed[HUGGINGFACE_ENDS[key]] = tensor
            continue
        _, n, leaf = key.split(".", 2)
        if leaf in ("attention.wq.weight", "attention.wk.weight"):
            per_head = tensor.view(-1, config.head_dim, config.hidden)
            tensor = torch.cat((per_head[:, 0::2], per_head[:, 1::2]), 1).reshape(tensor.shape)
        moe_leaf = leaf.replace("feed_forward", "block_sparse_moe")
        renamed[f"model.layers.{n}.{HUGGINGFACE_LEAVES.get(leaf, moe_leaf)}"] = tensor
    return renamed


def parameters_of(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The model's parameters as native tensors imply them."""
    get = {key.removesuffix(".weight"): tensor for key, tensor in tensors.items()}
    parameters = {key: get[key] for key in ("tok_embeddings", "norm", "output") if key in get}
    for n in range(config.layers):
        attention, ffn = f"layers.{n}.attention", f"layers.{n}.feed_forward"
        for key in (f"{attention}_norm", f"layers.{n}.ffn_norm", f"{attention}.wo"):
            parameters[key] = get[key]
        parameters[f"{attention}.wqkv"] = torch.cat([get[f"{attention}.w{x}"] for x in "qkv"])
        owners = expert_owners(ffn, config)
        w13 = torch.stack([torch.cat((get[f"{o}.w1"], get[f"{o}.w3"])) for o in owners])
        w2 = torch.stack([get[f"{o}.w2"] for o in owners])
        if config.experts:
            parameters[f"{ffn}.gate"] = get[f"{ffn}.gate"]
        parameters[f"{ffn}.w13"] = w13 if config.experts else w13[0]
        parameters[f"{ffn}.w2"] = w2 if config.experts else w2[0]
    return parameters


def native_params(config: ModelConfig) -> dict[str, Any]:
    """The contents of a `params.json` that describes the model."""
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
        "sliding_window": list(config.windows),
        "tied_embeddings": config.tied_embeddings,
    }
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
    return params


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` that describes the model, as transformers 5 writes it."""
    model_type = "ministral3" if config.yarn else "mixtral" if config.experts else "ministral"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn:
        rope |= asdict(config.yarn) | {"rope_type": "yarn"}
        rope["original_max_position_embeddings"] = rope.pop("original_max_positions")
        rope["llama_4_scaling_beta"] = config.q_scale.beta if config.q_scale else 0.0
    windows = [window for window in config.windows if window is not None]
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return {
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
        "sliding_window": windows[0] if windows else None,
        "layer_types": kinds,
        "tie_word_embeddings": config.tied_embeddings,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.top_k,
    }


def write_native(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> dict[str, Tensor]:
    """Writes a native checkpoint.

    Args:
        folder: where; made if absent.
        config: the model.
        tensors: what to write, under native keys; None = `native_tensors(config, ...)`.
        seed, dtype: of the random tensors.
        shards: number of files.

    Returns:
        The tensors written.
    """
    tensors = native_tensors(config, seed=seed, dtype=dtype) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(native_params(config)))
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        name = f"consolidated-{i + 1:05}-of-{shards:05}" if shards > 1 else "consolidated"
        save_file(part, folder / f"{name}.safetensors")
    return tensors


def write_huggingface(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> dict[str, Tensor]:
    """Writes a Hugging Face checkpoint; arguments as `write_native`, `tensors` under its keys.

    The config must have one window size at most, as `config.json` can say no more.
    """
    if tensors is None:
        native = native_tensors(config, seed=seed, dtype=dtype)
        tensors = {k: t.contiguous() for k, t in huggingface_tensors(native, config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(huggingface_config(config)))
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        name = f"model-{i + 1:05}-of-{shards:05}" if shards > 1 else "model"
        save_file(part, folder / f"{name}.safetensors")
        weight_map |= dict.fromkeys(part, f"{name}.safetensors")
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors

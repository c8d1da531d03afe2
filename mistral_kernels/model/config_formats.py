"""What `params.json` and `config.json` say, as the fields of a ModelConfig.

Every value is checked as it is read, and every error names its key. Where a key is absent the
default is the one of the program that wrote such files: mistral-inference, or the configuration
class of transformers.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from mistral_kernels.model.json_fields import REQUIRED, JsonFields
from mistral_kernels.model.quantisation import read_quantisation

# Above every model that is published or merged from several, and small enough that the table of a
# checkpoint's tensors is made in a second before the checkpoint contradicts a corrupt number.
MAX_LAYERS, MAX_EXPERTS = 256, 128

MLA = "MLA (multi-head latent attention) models are not supported"
MAMBA = "Mamba models are not supported"
UNSUPPORTED_TYPES = {"mamba": MAMBA, "mistral4": MLA, "mistral_large": MLA, "deepseek": MLA}


def native_fields(params: dict[str, Any]) -> dict[str, Any]:
    """Reads the contents of a `params.json`.

    Args:
        params: the file's items.

    Returns:
        The keyword arguments of ModelConfig; `yarn` and `q_scale` are theirs, or None.

    Raises:
        ValueError: a value is missing, malformed or not supported; the key is named.
    """
    fields = JsonFields(params)
    moe = fields.section("moe")
    _refuse_latent_attention(fields)
    if moe:
        moe.refuse("num_shared_experts", MLA)
        for key in moe.values.keys() - {"num_experts", "num_experts_per_tok"}:
            moe.refuse(key, "not supported")
    _model_type(fields, ("transformer",), "transformer")
    read_quantisation(fields)
    fields.refuse("use_biases", "biases are not supported")
    fields.choice("activation", ("silu",), "silu")
    hidden, q_heads = fields.integer("dim"), fields.integer("n_heads")
    layers = fields.integer("n_layers", maximum=MAX_LAYERS)
    windows = _native_windows(fields, layers)
    # The original params.json of 7B v0.1 has a window and no theta; it was trained with 1e4.
    default_theta = 1e4 if any(windows) else 1e6
    return {
        "hidden": hidden,
        "layers": layers,
        "q_heads": q_heads,
        "kv_heads": fields.integer("n_kv_heads"),
        "head_dim": _head_dim(fields, hidden, q_heads),
        "ffn_dim": fields.integer("hidden_dim"),
        "vocab": fields.integer("vocab_size"),
        "norm_eps": fields.number("norm_eps"),
        "rope_theta": fields.number("rope_theta", default_theta),
        "windows": windows,
        "tied_embeddings": fields.flag("tied_embeddings", False),
        "experts": moe.integer("num_experts", maximum=MAX_EXPERTS) if moe else 0,
        "top_k": moe.integer("num_experts_per_tok") if moe else 0,
        "yarn": _native_yarn(fields.section("yarn")),
        "q_scale": _native_q_scale(fields.section("llama_4_scaling")),
        "interleaved": True,
        "max_positions": fields.integer("max_seq_len", None)
        or fields.integer("max_position_embeddings", None),
    }


def _native_windows(fields: JsonFields, layers: int) -> tuple[int | None, ...]:
    """One window a layer, from a number for all or a list that is repeated over the layers."""
    key = "_sliding_window" if fields.get("sliding_window", None) is None else "sliding_window"
    value = fields.get(key, None)
    pattern = value if isinstance(value, list) else [value]
    if not pattern or layers % len(pattern):
        raise fields.error(key, f"a list whose length divides n_layers {layers}")
    return tuple(_window(entry, fields.name(key)) for entry in pattern) * (layers // len(pattern))


def _native_yarn(yarn: JsonFields | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    factor = yarn.number("factor")
    # Published files say apply_scale; where it is absent YaRN is meant as in its paper.
    scaled = yarn.flag("apply_scale", True)
    return {
        "factor": factor,
        "original_max_positions": yarn.integer("original_max_position_embeddings"),
        "beta_fast": yarn.number("beta"),
        "beta_slow": yarn.number("alpha"),
        "attention_factor": _yarn_scale(factor) if scaled else 1.0,
    }


def _native_q_scale(scaling: JsonFields | None) -> dict[str, Any] | None:
    beta = scaling.number("beta", zero=True) if scaling else 0.0
    if not beta:
        return None
    original = scaling.integer("original_max_position_embeddings")
    return {"beta": beta, "original_max_positions": original}


class ClassDefaults(NamedTuple):
    """What a transformers configuration class (5.23) assumes where `config.json` is silent."""

    norm_eps: float
    rope_theta: float
    window: int | None
    max_positions: int
    head_dim: int | None
    layers: int = 32
    vocab: int = 32000
    hidden: int = 4096
    q_heads: int = 32
    ffn_dim: int = 14336


HUGGINGFACE_DEFAULTS = {
    "mistral": ClassDefaults(1e-6, 1e4, 4096, 131072, None),
    "mixtral": ClassDefaults(1e-5, 1e6, None, 131072, None),
    "ministral": ClassDefaults(1e-6, 1e4, 4096, 131072, None),
    "ministral3": ClassDefaults(1e-5, 1e4, None, 262144, 128, layers=34, vocab=131072),
}

# Ministral3Config's rope where config.json has none at all.
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

# Multimodal types whose text model is described in `text_config`.
WRAPPERS = ("mistral3", "llava", "pixtral")

ARCHITECTURES = {
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "PixtralForConditionalGeneration",
}


def huggingface_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Reads the contents of a `config.json`, as transformers 4 and 5 write it.

    Args:
        config: the file's items.

    Returns:
        The keyword arguments of ModelConfig; `yarn` and `q_scale` are theirs, or None.

    Raises:
        ValueError: a value is missing, malformed or not supported; the key is named.
    """
    fields = JsonFields(config)
    text, model_type = _text_part(fields)
    defaults = HUGGINGFACE_DEFAULTS[model_type]

    def size(key: str, default: int, **limits: int) -> int:
        # transformers 4 left out of a text_config what equals its class's default, as Pixtral 12B's
        # 32 heads; at the top it wrote every size.
        left_out = text is not fields and key not in text
        return text.integer(key, default if left_out else REQUIRED, **limits)

    hidden = size("hidden_size", defaults.hidden)
    q_heads = size("num_attention_heads", defaults.q_heads)
    layers = size("num_hidden_layers", defaults.layers, maximum=MAX_LAYERS)
    # An absent num_key_value_heads is the class's 8, a null one means no grouping.
    kv_heads = text.integer("num_key_value_heads", q_heads if "num_key_value_heads" in text else 8)
    is_moe = model_type == "mixtral"
    rope = _rope_section(text, model_type)
    max_positions = text.integer("max_position_embeddings", defaults.max_positions)
    original = text.integer("original_max_position_embeddings", None) or rope.integer(
        "original_max_position_embeddings", max_positions
    )
    beta = rope.number("llama_4_scaling_beta", 0.0, zero=True)
    return {
        "hidden": hidden,
        "layers": layers,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": _head_dim(text, hidden, q_heads, defaults.head_dim),
        "ffn_dim": size("intermediate_size", defaults.ffn_dim),
        "vocab": size("vocab_size", defaults.vocab),
        "norm_eps": text.number("rms_norm_eps", defaults.norm_eps),
        "rope_theta": rope.number("rope_theta", text.number("rope_theta", defaults.rope_theta)),
        "windows": _huggingface_windows(text, layers, defaults.window),
        "tied_embeddings": _tied_embeddings(fields, text),
        "experts": text.integer("num_local_experts", 8, maximum=MAX_EXPERTS) if is_moe else 0,
        "top_k": text.integer("num_experts_per_tok", 2) if is_moe else 0,
        "yarn": _huggingface_yarn(rope, original, max_positions),
        "q_scale": {"beta": beta, "original_max_positions": original} if beta else None,
        "interleaved": False,
        "max_positions": max_positions,
    }


def _text_part(fields: JsonFields) -> tuple[JsonFields, str]:
    """The object that describes the text model, and its type; unsupported models are refused."""
    wrapper = fields.get("model_type")
    text = fields.section("text_config") if wrapper in WRAPPERS else fields
    if text is None:
        raise ValueError("text_config: missing")
    for part in (fields, text):
        _refuse_latent_attention(part)
        part.refuse("n_shared_experts", MLA)
        read_quantisation(part)
    default = "mistral" if wrapper == "mistral3" else REQUIRED
    model_type = _model_type(text, HUGGINGFACE_DEFAULTS, default)
    architectures = fields.get("architectures", [])
    if not isinstance(architectures, list) or set(map(str, architectures)) - ARCHITECTURES:
        raise fields.error("architectures", f"some of {', '.join(sorted(ARCHITECTURES))}")
    text.choice("hidden_act", ("silu",), "silu")
    text.refuse("attention_bias", "biases are not supported")
    text.refuse("mlp_bias", "biases are not supported")
    return text, model_type


def _tied_embeddings(fields: JsonFields, text: JsonFields) -> bool:
    """Whether the output is the embedding, as said at the top, in the text part, or in both."""
    key = "tie_word_embeddings"
    said = [part.flag(key, False) for part in (fields, text) if part.get(key, None) is not None]
    # Mistral3Config ties unless told otherwise, so what transformers 5 saves of a Mistral Small 3.1
    # with its own output says true at the top and false below. For Llava either word is enough.
    return bool(said) and (all if fields.get("model_type") == "mistral3" else any)(said)


def ties_unless_stored(config: dict[str, Any]) -> bool:
    """Whether a `config.json` leaves it to the weights if the output is the embedding.

    transformers ties a Mistral3 model unless told otherwise at the top, and unties it again if it
    finds an output of its own in the files. What it saves says true at the top and, as the default
    of the text part, false below, whether the model was tied or not; older files say nothing.
    """
    return config.get("model_type") == "mistral3" and config.get("tie_word_embeddings") is not False


def _rope_section(text: JsonFields, model_type: str) -> JsonFields:
    """The rope's parameters, one set for all layers and whole heads; any other is refused."""
    rope = text.section("rope_scaling") or text.section("rope_parameters")
    if rope is None:
        values = MINISTRAL3_ROPE if model_type == "ministral3" else {}
        rope = JsonFields(values, "rope_parameters")
    for key, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.error(key, "one rope for all layers")
    for part in (text, rope):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            raise part.error("partial_rotary_factor", "1.0")
    return rope


def _huggingface_yarn(rope: JsonFields, original: int, max_positions: int) -> dict | None:
    """YaRN's numbers; the attention factor is the one given, or follows from the others."""
    key = "rope_type" if "rope_type" in rope else "type"
    if rope.choice(key, ("default", "yarn"), "default") == "default":
        return None
    factor = rope.number("factor", None) or max_positions / original
    mscale = rope.number("mscale", 0.0, zero=True)
    mscale_all_dim = rope.number("mscale_all_dim", 0.0, zero=True)
    implied = _yarn_scale(factor)
    if mscale and mscale_all_dim:
        implied = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    return {
        "factor": factor,
        "original_max_positions": original,
        "beta_fast": rope.number("beta_fast", 32.0, zero=True) or 32.0,
        "beta_slow": rope.number("beta_slow", 1.0, zero=True) or 1.0,
        "attention_factor": rope.number("attention_factor", implied),
        "truncate": rope.flag("truncate", True),
    }


def _huggingface_windows(
    text: JsonFields, layers: int, default: int | None
) -> tuple[int | None, ...]:
    """One window a layer: `sliding_window`, for the sliding ones of `layer_types` if given."""
    window = default
    if "sliding_window" in text:
        window = _window(text.get("sliding_window", None), text.name("sliding_window"))
    kinds = text.get("layer_types", None)
    if kinds is None:
        return (window,) * layers
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise text.error("layer_types", f"{layers} times full_attention or sliding_attention")
    if window is None and "sliding_attention" in kinds:
        raise text.error("layer_types", "no sliding_attention without a sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _model_type(fields: JsonFields, allowed: Collection[str], default: Any) -> str:
    """The model type; those known but not supported are named for what they are."""
    for word, reason in UNSUPPORTED_TYPES.items():
        if word in str(fields.get("model_type", default)):
            fields.refuse("model_type", reason)
    return fields.choice("model_type", allowed, default)


def _refuse_latent_attention(fields: JsonFields) -> None:
    fields.refuse("kv_lora_rank", MLA)
    fields.refuse("q_lora_rank", MLA)


def _head_dim(fields: JsonFields, hidden: int, q_heads: int, default: int | None = None) -> int:
    """head_dim as given: q_heads * head_dim is not hidden in half of the published models."""
    if default is not None and "head_dim" not in fields:
        return default
    if fields.get("head_dim", None) is None and hidden % q_heads:
        raise ValueError(
            f"{fields.name('head_dim')}: missing, and {hidden} / {q_heads} is not whole"
        )
    return fields.integer("head_dim", hidden // q_heads)


def _window(value: Any, name: str) -> int | None:
    """A window of keys; null and 0 mean none, and some files hold the number as a string."""
    window = int(value) if isinstance(value, str) and value.isdecimal() else value
    if window is None or (type(window) is int and window == 0):
        return None
    if type(window) is not int or not 1 <= window < 2**31:
        raise ValueError(f"{name}: expected a window >= 1, or 0 or null for none, got {value!r}")
    return window


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention factor. Source: https://arxiv.org/abs/2309.00071"""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

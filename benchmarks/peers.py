"""The whole model as transformers has it, with its defaults: sdpa attention, grouped_mm experts.

transformers may be absent: then there is no such peer.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from torch import Tensor

from mistral_kernels import Transformer
from mistral_kernels.model.weight_table import huggingface_table

NAME = "transformers"


def installed() -> bool:
    """Tell whether there is a transformers to measure against."""
    return importlib.util.find_spec("transformers") is not None


def peers_of(op: str, device: str, wanted=None) -> tuple[dict, dict[str, str]]:
    """Return the peers of `op` that can run, and name -> reason of those that cannot."""
    if op not in ("model", "transformers") or (wanted is not None and NAME not in wanted):
        return {}, {}
    if not installed():
        return {}, {NAME: "not installed"}
    return {NAME: sys.modules[__name__]}, {}


class Peer:
    """transformers' model with the weights of ours.

    Args:
        model: a dense or Mixtral-shaped model on the CPU, with one window for all layers.
    """

    def __init__(self, model: Transformer):
        from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig
        from transformers.initialization import no_init_weights

        config = model.config
        sizes = {
            "hidden_size": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.q_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.ffn_dim,
            "vocab_size": config.vocab,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "sliding_window": config.windows[0],
            "tie_word_embeddings": config.tied_embeddings,
        }
        if config.experts:
            routing = {"num_local_experts": config.experts, "num_experts_per_tok": config.top_k}
            self.config = MixtralConfig(**sizes, **routing)
        else:
            self.config = MistralConfig(**sizes)
        with no_init_weights():  # they are copied below; initialising them takes seconds
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=model.dtype).eval()
        ours = dict(model.named_parameters())
        table = huggingface_table(config, stacked=bool(config.experts))
        self.model.load_state_dict(
            {key: ours[place.parameter][place.index] for key, place in table.items()}
        )

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Feed (tokens,) to a new cache; the last token's logits, (1, vocab)."""
        return self.model(input_ids[None], use_cache=True, logits_to_keep=1).logits[:, -1]

    def cache(self, keys_values: Tensor):
        """A cache as a prompt leaves it: `keys_values` is
        (layers, 2, 1, kv_heads, tokens, head_dim), keys rotated; each layer keeps its window."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        for layer, (keys, values) in enumerate(keys_values):
            cache.update(keys, values, layer)
        return cache

    def decode(self, tokens: Tensor, cache) -> Tensor:
        """Feed (steps,) tokens one by one; the logits of each, (steps, vocab)."""
        step = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return torch.cat([self.model(token.view(1, 1), **step).logits[0] for token in tokens])

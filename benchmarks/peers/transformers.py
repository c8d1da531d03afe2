"""The whole model as transformers 5 has it, with its defaults: sdpa attention, grouped_mm experts.

Each step and each prompt is timed whole; weights and a filled cache are made before.
"""

import torch
from torch import Tensor

from benchmarks.peers import packages
from mistral_kernels import Transformer
from mistral_kernels.model.config_writing import huggingface_config
from mistral_kernels.model.weight_table import huggingface_table

NAME = "transformers"


def missing(device: str) -> str | None:
    place = "transformers.initialization:no_init_weights"  # not before version 5
    return packages.missing("transformers", place, needs_cuda=False, device=device)


def model(shape, dtype, device):
    return Engine


class Engine:
    """transformers' model with the weights of ours.

    Args:
        model: one that a `config.json` can express.
    """

    def __init__(self, model: Transformer):
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        config = model.config
        values = huggingface_config(config)
        self.config = AutoConfig.for_model(values.pop("model_type"), **values)
        # Weights are copied below; to initialise them, or to move them, takes seconds.
        with no_init_weights(), model.device:
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=model.dtype).eval()
        ours = dict(model.named_parameters())
        table = huggingface_table(config, stacked=bool(config.experts))
        self.model.load_state_dict(
            {key: ours[place.parameter][place.index] for key, place in table.items()}
        )

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Feed (tokens,) to a new cache; the last token's logits, (1, vocab)."""
        return self.model(input_ids[None], use_cache=True, logits_to_keep=1).logits[:, -1]

    def cache(self, keys_values: Tensor, steps: int):
        """A cache as a prompt leaves it, with room for `steps` more tokens.

        `keys_values` is (layers, 2, 1, kv_heads, tokens, head_dim), keys rotated as our model has
        them; each layer keeps its window.
        """
        from transformers import DynamicCache

        return self.filled(DynamicCache(config=self.config), keys_values)

    def filled(self, cache, keys_values: Tensor):
        """`cache` of transformers with what `keys_values` holds for each layer."""
        for layer, (keys, values) in enumerate(keys_values):
            cache.update(keys, values, layer)
        return cache

    def decode(self, tokens: Tensor, cache) -> Tensor:
        """Feed (steps,) tokens one by one; the logits of each, (steps, vocab)."""
        return torch.cat([self.logits(token, cache) for token in tokens])

    def logits(self, token: Tensor, cache) -> Tensor:
        """Feed one token, (); its logits, (1, vocab)."""
        step = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(token.view(1, 1), **step).logits[0]

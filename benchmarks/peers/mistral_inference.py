"""Mistral's own inference code, archived, over xformers; signatures of mistral_inference 1.6.

Each step and each prompt is timed whole, its masks and lists of positions too, which it makes in
every call; weights and a filled cache are made before.
"""

import torch
from torch import Tensor

from benchmarks.peers import packages
from mistral_kernels import Transformer
from mistral_kernels.model.weight_table import checkpoint_table, interleaved_rows

NAME = "mistral_inference"
PLACES = tuple(
    f"mistral_inference.{place}"
    for place in (
        *("args:TransformerArgs", "moe:MoeArgs"),
        *("cache:BufferCache", "transformer:Transformer"),
    )
)


def missing(device: str) -> str | None:
    return packages.missing("mistral_inference", *PLACES, needs_cuda=True, device=device)


def model(shape, dtype, device):
    return Engine


class Engine:
    """Its Transformer with the weights of ours.

    Args:
        model: a dense or Mixtral-shaped model, with one window for all layers, that turns halves
            of a head; theirs turns pairs, and rows and cached keys are brought into that order.
    """

    def __init__(self, model: Transformer):
        from mistral_inference.args import TransformerArgs
        from mistral_inference.moe import MoeArgs
        from mistral_inference.transformer import Transformer as Theirs

        config = self.config = model.config
        args = TransformerArgs(
            dim=config.hidden,
            n_layers=config.layers,
            head_dim=config.head_dim,
            hidden_dim=config.ffn_dim,
            n_heads=config.q_heads,
            n_kv_heads=config.kv_heads,
            norm_eps=config.norm_eps,
            vocab_size=config.vocab,
            max_batch_size=1,
            rope_theta=config.rope_theta,
            moe=MoeArgs(config.experts, config.top_k) if config.experts else None,
        )
        ours = dict(model.named_parameters())
        weights = {key: place.of(ours) for key, place in checkpoint_table(config).items()}
        for key in weights:
            for leaf, heads in (("wq", config.q_heads), ("wk", config.kv_heads)):
                if key.endswith(f"attention.{leaf}.weight"):
                    weights[key] = interleaved_rows(weights[key], heads)
        if config.tied_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        self.device, self.dtype = next(iter(ours.values())).device, model.dtype
        self.model = Theirs(args).to(device=self.device, dtype=self.dtype).eval()
        self.model.load_state_dict(weights)

    def empty_cache(self, tokens: int):
        from mistral_inference.cache import BufferCache

        config = self.config
        sizes = (config.layers, 1, tokens, config.kv_heads, config.head_dim)
        cache = BufferCache(*sizes, sliding_window=config.windows[0])
        return cache.to(device=self.device, dtype=self.dtype)

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Feed (tokens,) to a new cache; the last token's logits, (1, vocab)."""
        tokens = len(input_ids)
        cache = self.empty_cache(tokens)
        hidden = self.model.forward_partial(input_ids, [tokens], cache)
        return self.model.output(hidden[-1:])

    def cache(self, keys_values: Tensor, steps: int):
        """See `benchmarks.peers.transformers.Engine.cache`."""
        tokens = keys_values.shape[-2]
        cache = self.empty_cache(tokens + steps)
        for layer, size in enumerate(cache.cache_sizes):
            # Position p lies in slot p % size.
            kept = torch.arange(max(0, tokens - size), tokens, device=self.device)
            keys, values = keys_values[layer, :, 0].transpose(1, 2)[:, kept]
            keys = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            cache.cache_k[layer][0, kept % size] = keys
            cache.cache_v[layer][0, kept % size] = values
        cache.init_kvseqlens(1)
        cache.kv_seqlens += tokens
        return cache

    def decode(self, tokens: Tensor, cache) -> Tensor:
        """Feed (steps,) tokens one by one; the logits of each, (steps, vocab)."""
        return torch.cat([self.model.forward(token[None], [1], cache) for token in tokens])

"""`RollingCache`: the rolling paged cache of this package as a cache of transformers.

transformers updates a cache before attention reads it. Ours notes the new tokens only; attention
then reads ring and new tokens, and stores these where they belong: one token in the same launch,
more of them afterwards, because they overwrite keys which their own first rows must see. Nothing is
rolled, concatenated or copied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from mistral_kernels.integrations.rolling_layer import NewTokens, RollingLayer
from mistral_kernels.ops.checks import check_int

FULL, WINDOWED = "full_attention", "sliding_attention"


class RollingCache(Cache):
    """A cache of transformers whose layers keep what their windows need, and no more.

    It goes wherever transformers takes `past_key_values`, for models that run with
    attn_implementation="mistral_kernels".

    Args:
        config: the model's; each layer's ring follows its own window.
        page_size: slots a page, a multiple of 16 for kernels on a GPU.
        lookahead: slots beyond the window: so many tokens and one more can be taken back by `crop`.
        max_tokens: most tokens of a sequence, of which layers without a window take the memory at
            once, as a compiled graph wants it. None: these layers grow.

    Raises:
        TypeError, ValueError: a size is out of range, or a layer is no attention over a window or
            over all tokens.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        page_size: int = 16,
        lookahead: int = 0,
        max_tokens: int | None = None,
    ):
        sizes = {"page_size": (page_size, 1), "lookahead": (lookahead, 0)}
        sizes |= {} if max_tokens is None else {"max_tokens": (max_tokens, 1)}
        for name, (value, minimum) in sizes.items():
            check_int("RollingCache", name, value, minimum)
        super().__init__(
            layers=[
                RollingLayer(window, page_size, lookahead, max_tokens)
                for window in layer_windows(config)
            ]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[NewTokens, NewTokens]:
        """Notes new tokens of a layer, see `RollingLayer.update`.

        Raises:
            RuntimeError: an interrupted step has left some layers a token ahead of others.
        """
        self.check_step(layer_idx, key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_step(self, layer_idx: int, new: int) -> None:
        """Refuses a step of `new` tokens that goes on from an interrupted one."""
        if layer_idx and not torch.compiler.is_compiling():
            first, tokens = self.layers[0]._tokens, self.layers[layer_idx]._tokens
            # None: a compiled step went before, and the host does not know.
            if None not in (first, tokens) and first != tokens + new:
                raise RuntimeError(
                    f"RollingCache: a step was interrupted: layer {layer_idx} holds {tokens} tokens"
                    f" before {new} new ones, layer 0 {first}; reset() it"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        made = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in made)


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer of a config of transformers, None for attention over all tokens.

    Raises:
        ValueError: a layer is of another kind.
    """
    text = config.get_text_config(decoder=True)
    layers = list(text.per_layer_config)
    types = getattr(text, "layer_types", None)
    if types is None:
        windows = (getattr(layer, "sliding_window", None) for layer in layers)
        types = [FULL if window is None else WINDOWED for window in windows]
    if unknown := set(types) - {FULL, WINDOWED}:
        raise ValueError(
            f"RollingCache: layers must be {FULL} or {WINDOWED}, got {', '.join(sorted(unknown))}"
        )
    return [
        layer.sliding_window if kind == WINDOWED else None
        for kind, layer in zip(types, layers, strict=True)
    ]

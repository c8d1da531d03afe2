"""`attn_implementation="mistral_kernels"`: the mask function and the attention function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mistral_kernels.integrations.attention_plan import (
    SWITCH,
    AttentionPlan,
    packed,
    refuse_gradient,
    require,
)
from mistral_kernels.integrations.rolling_layer import NewTokens

# What models pass on to attention, and what would be lost if it were not looked at.
REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "cache": "continuous batching's paged cache",
    "output_attentions": "output_attentions: the weights are never formed",
}


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config=None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **others,
) -> Tensor:
    """A plan of the attention that transformers describes, see `AttentionPlan`.

    Args:
        batch_size, q_length, kv_length: sizes of the mask that this stands for.
        q_offset: tokens before the first query.
        kv_offset: position of the first key that the cache will return.
        mask_function: the pattern, asked only about its neighbours in packed sequences.
        attention_mask: (batch, tokens so far), bool; False for padding.
        allow_is_causal_skip: False where transformers laid something over the causal pattern, or
            where it compiles a step of one token.
        local_size: the window, or the chunk of chunked attention.
        config: the model's.
        use_vmap: a mask function of the user's is laid over the causal pattern.
        device: where the plan is wanted.

    Raises:
        ValueError: a pattern that the ops do not have; the text says what to use instead.
    """
    window = getattr(config, "sliding_window", None)
    if "allow_is_bidirectional_skip" in others:
        raise ValueError(f'{SWITCH} is causal; for a bidirectional mask use "sdpa"')
    if local_size is not None and local_size != window:
        raise ValueError(f'{SWITCH} has no chunked attention; use "sdpa"')
    if allow_is_causal_skip or (q_length == 1 and not use_vmap):
        starts = None
        if attention_mask is not None:
            starts = _starts(attention_mask, q_length, q_offset)
            starts = None if starts is None else (starts - kv_offset).clamp(min=0)
        plan = AttentionPlan.of_batch(
            batch_size, q_length, context=q_offset - kv_offset, starts=starts, device=device
        )
    elif use_vmap or attention_mask is not None or q_length != kv_length:
        raise ValueError(
            f"{SWITCH} has causal, windowed and packed sequences, no pattern laid over them"
            ' (or_mask_function, and_mask_function, block_sequence_ids); use "sdpa"'
        )
    else:
        plan = AttentionPlan.of_packed(_begins(mask_function, batch_size, q_length, device))
    return plan.as_mask(local_size)


def _starts(mask: Tensor, q_length: int, q_offset: int | Tensor) -> Tensor | None:
    """First visible position of each sequence, None for 0; the ops take no other gap."""
    if isinstance(q_offset, int) and mask.shape[1] < q_offset + q_length:
        raise ValueError(
            f"{SWITCH}: attention_mask must cover the {q_offset} tokens in the cache and the"
            f" {q_length} new ones, got {mask.shape[1]} columns"
        )
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None  # one op for a dozen, each token
    places = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, places, mask.shape[1]).amin(-1)
    last = torch.where(mask, places, -1).amax(-1)
    visible = mask.sum(-1)
    # Padding behind the last token is seen by none before it.
    require(
        ((visible == last - first + 1) | (visible == 0)).all(),
        f"{SWITCH}: attention_mask must not hide tokens between visible ones, as right padding does"
        ' once a token follows it; pad on the left, or use "sdpa"',
    )
    return first


def _begins(pattern: Callable, batch: int, tokens: int, device: torch.device) -> Tensor:
    """(batch * tokens,), where a row of packed sequences is the first: it sees none before it."""
    sequences = torch.arange(batch, device=device)[:, None]
    places = torch.arange(tokens, device=device)[None]
    head = torch.zeros_like(sequences)
    after, before = places[:, 1:], places[:, :-1]
    require(
        ~pattern(sequences, head, before, after).any(),
        f'{SWITCH} is causal; for blocks of tokens that see each other use "sdpa"',
    )
    begins = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    begins[:, 1:] = ~pattern(sequences, head, after, before)
    return begins.flatten()


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewTokens,
    value: Tensor | NewTokens,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention of a transformers layer by `prefill_attention` or `decode_attention`.

    Args:
        module: the layer; says whether it is causal, unless `is_causal` does.
        query: (batch, q_heads, tokens, head_dim), rotated.
        key, value: (batch, kv_heads, keys, head_dim), the cache's included; or what a
            `RollingCache` returned.
        attention_mask: what `mask_function` made; None: no padding.
        dropout: must be 0.
        scaling: factor of q . k; None for head_dim ** -0.5.
        sliding_window: keys a query sees, itself included; None for all. A mask knows better: not
            every model passes its window on.

    Returns:
        (batch, tokens, q_heads, head_dim) and None, for there are no attention weights.

    Raises:
        ValueError: something the ops do not have; the text says what to use instead.
        RuntimeError: keys of a cache where a gradient is wanted.
    """
    for name, meaning in REFUSED.items():
        if others.get(name) is not None and others[name] is not False:
            raise ValueError(f'{SWITCH} has no {meaning}; use "eager"')
    if dropout:
        raise ValueError(f"{SWITCH} has no dropout: set attention_dropout to 0, got {dropout}")
    batch, _, tokens, _ = query.shape
    plan, window = None, sliding_window
    if attention_mask is not None:
        plan = AttentionPlan.from_mask(attention_mask)
        window = AttentionPlan.window_of(attention_mask)
    how = {"window": window, "scale": scaling}
    if isinstance(key, NewTokens):
        out = key.attend(packed(query), plan, **how)
    else:
        # Under autocast rotated tensors are float32 and others are not.
        query, key = query.to(value.dtype), key.to(value.dtype)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        out = _attend(query, key, value, plan, causal=causal, **how)
    return out.view(batch, tokens, *out.shape[1:]), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan | None, *, causal: bool, **how
) -> Tensor:
    """(batch * tokens, q_heads, head_dim) of keys that lie in tensors of transformers' own."""
    batch, _, tokens, _ = query.shape
    keys = key.shape[2]
    if keys == tokens:
        if plan is None:
            plan = AttentionPlan.of_batch(
                batch, tokens, context=0, starts=None, device=query.device
            )
        rows = map(packed, (query, key, value))
        return plan.attend(*rows, None, causal=causal, **how)
    if plan is None or not causal:
        raise ValueError(f"{SWITCH}: {keys} keys for {tokens} queries need a causal attention_mask")
    if how["window"] == 1:
        raise ValueError(
            f"{SWITCH}: the sliding caches of transformers keep the wrong keys for a window of 1;"
            " use RollingCache"
        )
    refuse_gradient(query, key, value)
    # transformers' buffer, read where it lies, as a ring of one page a sequence that never wraps.
    ring = (key.transpose(1, 2), value.transpose(1, 2), plan.pages[:, None])
    return plan.attend(packed(query), None, None, ring, **how)

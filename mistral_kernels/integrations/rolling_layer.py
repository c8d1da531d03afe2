"""The ring of one layer of a `RollingCache`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from mistral_kernels.integrations.attention_plan import (
    NOT_QUANTISED,
    AttentionPlan,
    packed,
    refuse_gradient,
    require,
)
from mistral_kernels.ops.dispatch import BoundOp, device_capability, prefer
from mistral_kernels.ops.ring import has_overwritten

STORE = BoundOp("store_kv_", "auto")

GROWTH = 1.25  # of a layer without a window, each time it is full: what is copied stays linear


@functools.cache
def _decode_op(device: torch.device, dtype: torch.dtype, facts: tuple) -> BoundOp:
    call = {"device_type": device.type, "capability": device_capability(device), "dtype": dtype}
    backend = prefer("decode_attention", **call, facts=facts, backend="auto")
    return BoundOp("decode_attention", backend)


class NewTokens:
    """What `update` returns in place of keys and values: the tokens to attend, and their ring."""

    def __init__(self, layer: RollingLayer, keys: Tensor, values: Tensor):
        self.layer, self.keys, self.values = layer, keys, values

    def attend(
        self,
        q: Tensor,
        plan: AttentionPlan | None,
        *,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        """Attention over the ring and the new tokens, which are in the ring afterwards."""
        return self.layer.attend(q, self.keys, self.values, plan, window, scale)

    def __getattr__(self, name: str):
        raise AttributeError(
            f"a RollingCache gives no tensor with {name!r}: it is read by"
            ' attn_implementation="mistral_kernels" only; set it on the model'
        )


class RollingLayer(CacheLayerMixin):
    """The ring of one layer; `keys` and `values` are (pages, page_size, kv_heads, head_dim).

    `length` counts tokens on the device, so that a graph that is compiled once serves every step;
    the host's count may be out of date after such a graph has run.
    """

    is_compileable = False  # so that generate() does not compile on its own
    is_croppable = True

    def __init__(self, window: int | None, page_size: int, lookahead: int, max_tokens: int | None):
        super().__init__()
        self.window, self.page_size, self.lookahead = window, page_size, lookahead
        self.max_tokens = max_tokens
        self.is_sliding = window is not None
        # Whether positions may wrap: the ring has all that a window needs.
        self.rolls = window is not None and (max_tokens is None or window + lookahead < max_tokens)
        self._tokens: int | None = 0  # None: ask the device
        self._written = 0  # highest length reached: slots up to it were overwritten
        self._pending = False

    @property
    def capacity(self) -> int:
        """Slots of a sequence."""
        return self.block_table.shape[1] * self.page_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the ring for (batch, kv_heads, tokens, head_dim) keys and values."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "RollingCache: its memory is made outside a compiled graph: feed the prompt first,"
                " or call early_initialization"
            )
        self.batch_size, self.kv_heads, tokens, self.head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.rolls:
            slots = self.window + self.lookahead
        else:
            slots = max(tokens, 1) if self.max_tokens is None else self.max_tokens
        # inference_mode(False): a cache made inside it could not be written outside.
        with torch.inference_mode(False):
            self.keys, self.values, self.block_table = self._pages(slots)
            self.length = torch.zeros((), dtype=torch.int64, device=self.device)
            for tensor in (self.keys, self.values, self.block_table, self.length):
                torch._dynamo.mark_static_address(tensor)
        self._tokens = self._written = 0
        self.is_initialized = True

    def _pages(self, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty keys and values and a block table, of at least `slots` slots a sequence."""
        per_seq = -(-slots // self.page_size)
        table = torch.arange(self.batch_size * per_seq, dtype=torch.int32, device=self.device)
        shape = (len(table), self.kv_heads, self.page_size, self.head_dim)
        keys, values = (
            torch.empty(shape, dtype=self.dtype, device=self.device).transpose(1, 2)
            for _ in range(2)
        )
        return keys, values, table.view(self.batch_size, per_seq)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[NewTokens, NewTokens]:
        """Notes new tokens for the attention that follows.

        Args:
            key_states, value_states: (batch, kv_heads, tokens, head_dim), keys rotated.

        Raises:
            ValueError: another batch or other heads than the cache holds, or more tokens than
                max_tokens.
            RuntimeError: the tokens of the last call were never attended.
        """
        # In this order: a compiled graph would be compiled anew where it looked at `_tokens`.
        if not self.is_initialized or (not self._holds(key_states) and self._tokens == 0):
            self.lazy_initialization(key_states, value_states)
        batch, heads, tokens, head_dim = key_states.shape
        self.expect(batch, heads, tokens, head_dim)
        self._pending = True
        new = NewTokens(self, key_states, value_states)
        return new, new

    def expect(self, batch: int, heads: int, tokens: int, head_dim: int) -> None:
        """Makes room for new tokens, or refuses them as `update` says."""
        if (batch, heads, head_dim) != (self.batch_size, self.kv_heads, self.head_dim):
            raise ValueError(
                f"RollingCache: it holds {self.batch_size} sequences, got {batch}; reset() it first"
                if batch != self.batch_size
                else f"RollingCache: it holds (kv_heads, head_dim) {self.kv_heads, self.head_dim},"
                f" got {heads, head_dim} of another model; reset() it first"
            )
        if self._pending:
            raise RuntimeError(
                "RollingCache: the tokens of its last update were never attended (a step was"
                ' interrupted, or attn_implementation is not "mistral_kernels"); reset() it'
            )
        if not self.rolls:
            self._make_room(tokens)

    def takes(self, x: Tensor) -> bool:
        """Whether the ring holds tokens, and more like x go in without a cast."""
        held = self.is_initialized and self._tokens != 0  # an empty one may be made anew
        return held and self.dtype == x.dtype and self.device == x.device

    def _holds(self, keys: Tensor) -> bool:
        """Whether the ring was made for such (batch, kv_heads, tokens, head_dim)."""
        batch, heads, _, head_dim = keys.shape
        return (batch, heads, head_dim) == (self.batch_size, self.kv_heads, self.head_dim)

    def _make_room(self, tokens: int) -> None:
        """Without a window no position may wrap: the layer grows, or refuses."""
        if torch.compiler.is_compiling():
            if self.max_tokens is None:
                raise RuntimeError(
                    "RollingCache: a layer without a window grows, which a compiled graph cannot;"
                    " make the cache with max_tokens"
                )
            full = f"RollingCache: it was made for max_tokens={self.max_tokens} and is full"
            require(self.length + tokens <= self.max_tokens, full)
            return
        needed = self.get_seq_length() + tokens
        if self.max_tokens is not None and needed > self.max_tokens:
            raise ValueError(
                f"RollingCache: a sequence would reach {needed} tokens, but the cache was made for"
                f" max_tokens={self.max_tokens}"
            )
        if needed > self.capacity:
            self._grow(max(needed, int(GROWTH * self.capacity)))

    def _grow(self, slots: int) -> None:
        with torch.inference_mode(False):
            keys, values, table = self._pages(slots)
            old = self.block_table
            kept = table[:, : old.shape[1]].flatten()
            keys[kept], values[kept] = self.keys[old.flatten()], self.values[old.flatten()]
            self.keys, self.values, self.block_table = keys, values, table

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: AttentionPlan | None,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        """Attention of q (batch * tokens, q_heads, head_dim) over the ring and new tokens."""
        k, v = (packed(x).to(self.dtype) for x in (keys, values))
        if plan is None:
            plan = AttentionPlan.of_batch(
                self.batch_size,
                keys.shape[2],
                context=self.length,
                starts=None,
                device=self.device,
            )
        tokens = keys.shape[2]
        out = self.attend_rows(q.to(self.dtype), k, v, tokens, plan, window, scale)
        self.advance(tokens)
        return out

    def attend_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: int,
        plan: AttentionPlan,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        """As `attend`, of q, k and v (batch * tokens, heads, head_dim) in the ring's dtype; the
        new tokens do not count before `advance`."""
        if self.window is not None and (window is None or window > self.window):
            raise ValueError(
                f"RollingCache: a layer attends over a window of {window}, but its ring was made"
                f" for {self.window}; make the cache from this model's config"
            )
        refuse_gradient(q, k, v)
        ring = (self.keys, self.values, self.block_table)
        how = {"window": window, "scale": scale, "decode": self._decode(q.shape[1])}
        out = plan.attend(q, k, v, ring, **how)
        if tokens > 1:
            STORE(k, v, *ring, plan.cu_seqlens, plan.context_lens, *NOT_QUANTISED)
        return out

    def _decode(self, q_heads: int) -> BoundOp | None:
        """`decode_attention`, bound to what serves it for this ring; in a graph nobody waits."""
        if torch.compiler.is_compiling():
            return None
        group, head_dim = ("group", q_heads // self.kv_heads), ("head_dim", self.head_dim)
        facts = group, head_dim, ("page_size", self.page_size)
        return _decode_op(self.device, self.dtype, facts)

    def advance(self, tokens: int) -> None:
        """Counts tokens that were attended."""
        self._pending = False
        if torch.compiler.is_compiling():
            self._tokens = None
        else:
            self._tokens = self.get_seq_length() + tokens
            self._written = max(self._written, self._tokens)
        self.length.add_(tokens)

    def get_seq_length(self) -> int | Tensor:
        """Tokens so far; in a compiled graph as a tensor, so that it need not be compiled anew."""
        if not self.is_initialized:
            return 0
        if torch.compiler.is_compiling():
            return self.length
        if self._tokens is None:
            self._tokens = int(self.length)
            self._written = max(self._written, self._tokens)
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys after this step, and the position of the first: all have their own."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Most tokens that a sequence may have, -1 for any number."""
        return -1 if self.rolls or self.max_tokens is None else self.max_tokens

    def reset(self) -> None:
        """Empties the ring, for the same batch or another."""
        self._tokens = self._written = 0
        self._pending = False
        if self.is_initialized:
            self.length.zero_()

    def activate_past_recording(self) -> None:
        """Says that tokens will be taken back, as in assisted generation."""
        if self.rolls and not self.lookahead:
            raise ValueError(
                "RollingCache: assisted generation takes tokens back; make the cache with"
                " lookahead=N for up to N + 1 of them, num_assistant_tokens and those it grows to"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, given as a negative number.

        Raises:
            ValueError: more tokens than there are, or so many that keys which the next token must
                see were overwritten.
        """
        if not self.is_initialized:
            return
        length = self.get_seq_length() + tokens_to_remove
        if tokens_to_remove > 0 or length < 0:
            raise ValueError(
                f"RollingCache: crop takes {-self.get_seq_length()} .. 0, got {tokens_to_remove}"
            )
        if self.rolls and has_overwritten(self._written, self.capacity, self.window, length):
            raise ValueError(
                f"RollingCache: {-tokens_to_remove} tokens cannot be taken back with"
                f" lookahead={self.lookahead}: their keys overwrote keys still needed"
            )
        self._tokens = length
        self.length.fill_(length)

    def _choose(self, sequences: Tensor) -> None:
        """Makes the given sequences, in that order, the batch."""
        if self.is_initialized:
            pages = self.block_table[sequences.to(self.device)]
            self.batch_size = len(pages)
            with torch.inference_mode(False):
                keys, values = self.keys[pages.flatten()], self.values[pages.flatten()]
                table = torch.arange(pages.numel(), dtype=torch.int32, device=self.device)
                self.keys, self.values, self.block_table = keys, values, table.view(pages.shape)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Goes on with the chosen beams."""
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences of the batch."""
        self._choose(torch.arange(self.batch_size)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence of the batch."""
        self._choose(torch.arange(self.batch_size).repeat_interleave(repeats))

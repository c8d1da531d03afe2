"""The rolling paged KV cache of a model: one ring a layer, as long as that layer's window needs.

With window 4096, a 32k-token sequence takes 4096 slots a layer instead of 32768. A layer without a
window gets a ring of `max_tokens` slots, which never wraps: the model refuses tokens beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.recorded_steps import StepRecordings
from mistral_kernels.ops.checks import check_int, is_int
from mistral_kernels.ops.decode_attention import decode_attention_workspace_bytes
from mistral_kernels.ops.dispatch import BoundOp
from mistral_kernels.ops.ring import has_overwritten

if TYPE_CHECKING:
    from mistral_kernels.model.decode_step import DecodeSteps

PAGE_ALIGNMENT = 16  # a page is a multiple of the kernels' smallest key tile
MOST_TOKENS = 2**31 - 1  # positions are int32


class LayerCache(NamedTuple):
    """One layer's ring."""

    k: Tensor  # (pages, page_size, kv_heads, head_dim); within a page, heads lie one by one
    v: Tensor  # the same
    block_table: Tensor  # (batch, pages_per_seq), int32
    window: int | None
    workspace: Tensor | None = None  # of decode_attention; all layers share it: they run in turn
    decode: BoundOp | None = None  # decode_attention, if the model's own does not take the pages

    @property
    def capacity(self) -> int:
        return self.block_table.shape[1] * self.k.shape[1]


class KVCache:
    """Keys and values of `batch` sequences, and how many tokens each holds.

    Args:
        config: the model's shape; every layer's ring follows its own window.
        batch: sequences.
        max_tokens: most tokens a sequence may reach, prompt and generated together.
        lookahead: slots beyond the window, so that up to `lookahead` tokens can be rolled back, or
            stored before they are attended.
        page_size: slots a page, a multiple of 16 for the kernels; None: one page a sequence.
        device, dtype: where and as what keys and values are stored.
        backend: what serves decode_attention, which may want a workspace. With one, the steps of a
            cache belong on one stream.

    Attributes:
        lengths: tokens of each sequence so far; the next one gets this position. A step that is
            interrupted counts for nothing; if it has spoilt a place, the next step refuses that.
        starts: first position that each sequence may see; set it after left padding.
        layers: one LayerCache a layer; those with as many pages share one block table.
        decode_steps: what `generate` keeps of its decode steps: static tensors and, on a GPU, CUDA
            graphs.
        recordings: on the CPU, the steps whose calls are replayed. Both hold on to the model.

    Raises:
        ValueError, TypeError: a size is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        *,
        lookahead: int = 0,
        page_size: int | None = None,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "auto",
    ):
        sizes = {"batch": (batch, 0), "max_tokens": (max_tokens, 1), "lookahead": (lookahead, 0)}
        sizes |= {} if page_size is None else {"page_size": (page_size, 1)}
        for name, (value, minimum) in sizes.items():
            check_int("new_cache", name, value, minimum)
        if max_tokens > MOST_TOKENS:
            raise ValueError(f"new_cache: max_tokens must be <= {MOST_TOKENS}, got {max_tokens}")
        self.config, self.device, self.dtype = config, device, dtype
        self.batch, self.max_tokens, self.lookahead = batch, max_tokens, lookahead
        self.lengths = [0] * batch
        self.starts = [0] * batch
        self._written = [0] * batch  # highest length reached: slots up to it were overwritten
        self.forget_steps()
        self._tables: dict[int, Tensor] = {}  # pages a sequence -> their block table
        layers = [
            self._new_layer(config, window, page_size, device, dtype) for window in config.windows
        ]
        workspace = self._new_workspace(layers, backend)
        self.layers = [layer._replace(workspace=workspace) for layer in layers]

    def _new_workspace(self, layers: list[LayerCache], backend: str) -> Tensor | None:
        """The workspace of any layer's decode_attention, None if `backend` needs none."""
        how = {"q_heads": self.config.q_heads, "dtype": self.dtype, "backend": backend}
        sizes = [
            decode_attention_workspace_bytes(layer.k, layer.block_table, window=layer.window, **how)
            for layer in layers
        ]
        with torch.inference_mode(False):  # as for the layers
            size = max(sizes, default=0)
            return torch.zeros(size, dtype=torch.uint8, device=self.device) if size else None

    def _new_layer(self, config, window, page_size, device, dtype) -> LayerCache:
        slots = self.max_tokens
        if window is not None:
            slots = min(window + self.lookahead, slots)
        page = page_size or -(-slots // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
        pages_per_seq = -(-slots // page)
        pages = self.batch * pages_per_seq
        # inference_mode(False): a cache made inside it could not be written outside.
        with torch.inference_mode(False):
            k, v = (
                torch.empty(
                    pages, config.kv_heads, page, config.head_dim, device=device, dtype=dtype
                ).transpose(1, 2)
                for _ in range(2)
            )
            if pages_per_seq not in self._tables:
                table = torch.arange(pages, dtype=torch.int32, device=device)
                self._tables[pages_per_seq] = table.view(self.batch, pages_per_seq)
            return LayerCache(k, v, self._tables[pages_per_seq], window)

    def __getstate__(self) -> dict:
        # A copy's steps would write into this cache.
        return self.__dict__ | {"decode_steps": None, "recordings": StepRecordings()}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(2 * layer.k.numel() * layer.k.element_size() for layer in self.layers)

    def check_room(self, seqlens: Sequence[int], name: str = "forward") -> None:
        """Refuses tokens that a sequence has no room or no keys for, before anything is written.

        `name` stands in front of the error.
        """
        for b, (length, tokens) in enumerate(zip(self.lengths, seqlens, strict=True)):
            if tokens and self._lost_keys(b, length):
                raise ValueError(
                    f"{name}: sequence {b} was interrupted in a step that had overwritten keys"
                    f" which its next token must see; empty its place with cache.reset({b})"
                )
            if length + tokens > self.max_tokens:
                raise ValueError(
                    f"{name}: sequence {b} would reach {length + tokens} tokens, but the cache"
                    f" was made for max_tokens={self.max_tokens}"
                )

    def begin(self, seqlens: Sequence[int]) -> None:
        """Notes what a step may overwrite, should it be interrupted after some of its layers."""
        for b, (length, tokens) in enumerate(zip(self.lengths, seqlens, strict=True)):
            # An empty place has no keys that earlier steps could have overwritten.
            before = self._written[b] if length else 0
            self._written[b] = max(before, length + tokens)

    def advance(self, seqlens: Sequence[int]) -> None:
        """Counts the tokens that a step has stored."""
        self.begin(seqlens)
        self.lengths = [a + b for a, b in zip(self.lengths, seqlens, strict=True)]

    def _lost_keys(self, sequence: int, length: int) -> bool:
        """Whether a ring has overwritten keys that the token at position `length` must see."""
        if self._written[sequence] == length:
            return False
        for layer in self.layers:
            if has_overwritten(self._written[sequence], layer.capacity, layer.window, length):
                return True
        return False

    def rollback(self, tokens: int | Sequence[int]) -> None:
        """Forgets the last tokens of sequences, for example of a rejected draft.

        Args:
            tokens: how many: an int for every sequence, or a list with one entry each.

        Raises:
            TypeError: tokens holds something else than ints.
            ValueError: more than a sequence holds, or so many that a ring has already overwritten
                keys which the next token must see (see `lookahead`).
        """
        counts = [tokens] * self.batch if is_int(tokens) else tokens
        if not isinstance(counts, Sequence) or not all(map(is_int, counts)):
            raise TypeError(f"rollback: tokens must be an int or a list of ints, got {tokens!r}")
        if len(counts) != self.batch:
            raise ValueError(f"rollback: tokens must have {self.batch} entries, got {len(counts)}")
        for b, count in enumerate(counts):
            length = self.lengths[b] - count
            if count < 0 or length < 0:
                raise ValueError(
                    f"rollback: tokens must be in [0, {self.lengths[b]}] for sequence {b},"
                    f" got {count}"
                )
            if self._lost_keys(b, length):
                raise ValueError(
                    f"rollback: {count} tokens of sequence {b} are more than lookahead"
                    f" {self.lookahead} allows: their keys overwrote keys still needed"
                )
        self.lengths = [a - b for a, b in zip(self.lengths, counts, strict=True)]

    def forget_steps(self) -> None:
        """Drops the steps that are kept to be replayed, and with them the model and their memory.

        The sequences stay as they are. The next steps are made anew.
        """
        self.decode_steps: DecodeSteps | None = None
        self.recordings = StepRecordings()

    def reset(self, sequence: int | None = None) -> None:
        """Empties one sequence's place for another sequence, or all of them.

        Raises:
            ValueError: there is no such place.
        """
        if sequence is not None and (not is_int(sequence) or not 0 <= sequence < self.batch):
            raise ValueError(f"reset: sequence must be in [0, {self.batch}), got {sequence!r}")
        for b in range(self.batch) if sequence is None else (sequence,):
            self.lengths[b] = self.starts[b] = self._written[b] = 0

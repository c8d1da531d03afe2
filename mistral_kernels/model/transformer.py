"""The whole model: embedding, blocks, norm, output. Dense or mixture of experts is a field.

Sequences are packed: input_ids of all of them in one row of T tokens, `seqlens` saying how many
belong to each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mistral_kernels.model.backends import choose_backends, decode_backend
from mistral_kernels.model.cache import KVCache, LayerCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.forward_checks import check_inputs
from mistral_kernels.model.layers import (
    BATCH_INVARIANT,
    Block,
    Kernels,
    parameter,
    residual_norm,
)
from mistral_kernels.model.low_bit_weight import LowBitForm, layer_forms
from mistral_kernels.model.recorded_steps import StepRecordings
from mistral_kernels.model.rope_tables import RopeTables, rope_tables
from mistral_kernels.model.savable_module import SavableModule
from mistral_kernels.model.step import ALL, Step, plan_step
from mistral_kernels.ops.checks import FLOATS, check_int, compute_dtype, is_int
from mistral_kernels.ops.dispatch import BoundOp

if TYPE_CHECKING:
    from mistral_kernels.model.tokenizer import Tokenizer


class Transformer(SavableModule):
    """A Mistral or Mixtral model.

    Args:
        config: its shape.
        device, dtype: of the parameters, which are left uninitialised; None: torch's defaults.
        max_batch_size: most sequences that `generate` and `stream` run at once.
        backend: a preference: an op without that backend takes what `auto` chooses. `backends`
            tells which backend serves each op.
        low_bit: name to form of the weights that are in few bits, as `layers.0.attention.wqkv`.

    Attributes:
        folder: the checkpoint it was loaded from, None for a model made from a config.
        low_bit: the argument, {} where it was None.
        quantisation: in words, how that stores the weights that are in few bits; None: all are in
            full.
        tokenizer: turns text into token ids and back; read from the folder at first use.
        use_graphs: whether `generate` and `stream` replay decode steps as CUDA graphs where they
            can; False launches them op by op, with the same results.
        kernels: op -> the op on the backend that serves it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = 1,
        backend: str = "auto",
        low_bit: Mapping[str, LowBitForm] | None = None,
    ):
        super().__init__()
        check_int("Transformer", "max_batch_size", max_batch_size, 1)
        if dtype is not None and dtype not in FLOATS:
            expected = ", ".join(map(str, FLOATS))
            raise ValueError(f"Transformer: dtype must be one of {expected}, got {dtype}")
        device = torch.get_default_device() if device is None else device
        try:
            device = torch.empty(0, device=device).device
        # AssertionError and ImportError: what torch was not compiled for.
        except (RuntimeError, TypeError, AssertionError, ImportError) as error:
            reason = str(error).split(". ")[0].splitlines()[0]
            raise ValueError(
                f"Transformer: device must be an available torch device, got {device!r} ({reason})"
            ) from error
        self.config, self.max_batch_size = config, max_batch_size
        self.folder: Path | None = None
        self.quantisation: str | None = None
        self.low_bit = dict(low_bit or {})
        self._tokenizer: Tokenizer | None = None
        self.use_graphs = True
        self.kernels: Kernels = {}
        self._tables: RopeTables | None = None
        place = {
            "device": device,
            "dtype": torch.get_default_dtype() if dtype is None else dtype,
        }
        self.tok_embeddings = parameter(config.vocab, config.hidden, **place)
        self.layers = nn.ModuleList(
            Block(config, window, self.kernels, layer_forms(self.low_bit, n), **place)
            for n, window in enumerate(config.windows)
        )
        self.norm = parameter(config.hidden, **place)
        if not config.tied_embeddings:
            self.output = parameter(config.vocab, config.hidden, **place)
        self.set_backend(backend)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.dtype

    def num_parameters(self, *, active: bool = False) -> int:
        """Weights of the model; `active`: of the experts only the top_k that a token is sent to."""
        return self.config.num_parameters(active=active)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._tables = None
        self.set_backend(self.backend)
        return self

    @property
    def backends(self) -> dict[str, str]:
        """op -> the backend that serves it."""
        return {op: kernel.backend for op, kernel in self.kernels.items()}

    def set_backend(self, backend: str) -> None:
        """Prefers `backend` from now on, and notes in `backends` what serves each op.

        Raises:
            ValueError: no such backend; then nothing has changed.
        """
        how = {"device": self.device, "dtype": self.dtype, "backend": backend}
        chosen = choose_backends(self.config, **how, low_bit=self.low_bit)
        self.backend = backend
        # In place: the blocks share this dict.
        self.kernels.update({op: BoundOp(op, name) for op, name in chosen.items()})

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the checkpoint, read when it is first asked for; it can be set.

        Raises:
            ValueError: there is none, or it does not fit this model; names the way out.
            TypeError: what is set is no tokenizer.
        """
        if self._tokenizer is None:
            if self.folder is None:
                raise ValueError(
                    "Transformer: a model that comes from no folder has no tokenizer;"
                    " set model.tokenizer, or work with token ids"
                )
            from mistral_kernels.model.tokenizer import Tokenizer  # loads mistral-common

            try:
                self.tokenizer = Tokenizer.from_folder(self.folder, self.config)
            except FileNotFoundError as error:
                raise ValueError(f"Transformer: {error}; or set model.tokenizer") from error
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        if not callable(getattr(tokenizer, "check_fits", None)):
            name = type(tokenizer).__name__
            raise TypeError(f"Transformer: tokenizer must be a Tokenizer, got {name}")
        tokenizer.check_fits(self.config)
        self._tokenizer = tokenizer

    def rope_tables(self, max_positions: int) -> RopeTables:
        """The rotary tables, grown if they are shorter than `max_positions`."""
        if self._tables is None or len(self._tables.cos) < max_positions:
            self._tables = rope_tables(
                self.config, max_positions, self.device, compute_dtype(self.dtype)
            )
        return self._tables

    def new_cache(
        self, batch: int, max_tokens: int, *, lookahead: int = 0, page_size: int | None = None
    ) -> KVCache:
        """An empty rolling cache for this model.

        Args:
            batch: sequences, >= 0.
            max_tokens: most tokens a sequence may reach, prompt and generated together.
            lookahead: tokens that can be rolled back, see KVCache.
            page_size: slots a page, a multiple of 16 for the kernels; None: one page a sequence.

        Returns:
            A KVCache in the model's dtype and on its device.

        Raises:
            TypeError, ValueError: a size is out of range, or the backend that the model was asked
                to take does not serve such pages.
        """
        backend = own = self.backends["decode_attention"]
        if is_int(page_size):
            how = {"device": self.device, "dtype": self.dtype, "backend": self.backend}
            backend = decode_backend(self.config, **how, page_size=page_size)
        cache = KVCache(
            self.config,
            batch,
            max_tokens,
            lookahead=lookahead,
            page_size=page_size,
            device=self.device,
            dtype=self.dtype,
            backend=backend,
        )
        if backend != own:
            decode = BoundOp("decode_attention", backend)
            cache.layers = [layer._replace(decode=decode) for layer in cache.layers]
        self.rope_tables(max_tokens)  # grown now, so that no step has to
        return cache

    def forward(
        self,
        input_ids: Tensor,
        seqlens: Sequence[int],
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of packed sequences.

        Args:
            input_ids: (T,), int32 or int64, the new tokens of all sequences one after another.
            seqlens: new tokens of each sequence, some may be 0; they sum to T.
            cache: from `new_cache`, with one place for each of `seqlens`; it is advanced. None:
                every sequence starts here. Attention is causal and never crosses sequences.
            last_only: only the logits of each sequence's last token.

        Returns:
            (T, vocab), or with last_only (batch, vocab), float32 (float64 for a float64 model). A
            sequence that feeds no token has zeros there.

        Raises:
            TypeError, ValueError: an argument does not fit, a token id is out of range, or a
                sequence outgrows the cache; then the cache is as before.
        """
        seqlens = check_inputs(input_ids, seqlens, cache, self)
        batch = len(seqlens)
        lengths = [0] * batch if cache is None else cache.lengths
        starts = [0] * batch if cache is None else cache.starts
        longest = max(seqlens, default=0) if cache is None else cache.max_tokens
        tables = self.rope_tables(longest)
        step = plan_step(seqlens, lengths, starts, cache is not None, self.device)

        if cache is not None and len(input_ids):
            cache.begin(seqlens)
        layers = [None] * len(self.layers) if cache is None else cache.layers
        recordings = None if cache is None else cache.recordings
        how = {"last_only": last_only, "recordings": recordings}
        logits = self.run(input_ids.to(self.device), step, tables, layers, **how)
        if cache is not None:
            cache.advance(seqlens)
        return logits

    def run(
        self,
        input_ids: Tensor,
        step: Step,
        tables: RopeTables,
        layer_caches: Sequence[LayerCache | None],
        *,
        last_only: bool,
        recordings: StepRecordings | None,
    ) -> Tensor:
        """The device's part of `forward`: arguments that fit, nothing waits, no cache is advanced.

        It reads nothing but tensors where `step` holds tensors, so a CUDA graph can replay it; on
        the CPU `recordings`, those of the cache, replay it where they can.
        """

        def compute(x: Tensor, step: Step) -> Tensor:
            added = None
            if len(x):
                for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
                    x, added = layer(x, added, step, tables, layer_cache)
            if last_only and step.last_rows is not ALL:
                x = _chosen_rows(x, step.last_rows)
                added = None if added is None else _chosen_rows(added, step.last_rows)
            normed, _ = residual_norm(self.kernels, x, added, self.norm, self.config.norm_eps)
            weight = self.tok_embeddings if self.config.tied_embeddings else self.output
            return self.kernels["linear"](normed, weight, BATCH_INVARIANT)

        x = nn.functional.embedding(input_ids, self.tok_embeddings)  # (T, hidden)
        if recordings is None:
            logits = compute(x, step)
        else:
            logits = recordings.run(self, x, step, tables, layer_caches, compute)
        return logits.to(compute_dtype(logits.dtype))


def _chosen_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x, and where `rows` is -1 zeros: logits of what feeds nothing are zero."""
    return torch.cat((x, x.new_zeros(1, x.shape[1])))[rows]

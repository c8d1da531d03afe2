"""What our mask function gives transformers in place of a mask: a few integers a sequence.

transformers hands its attention mask from the mask function, past caches and layers, to the
attention function without looking into it, as long as it is a tensor of four dimensions. Ours holds
what the ops want to know: where each sequence's rows begin, how many tokens came before them, and
the first token that padding leaves visible. Two sequences of 3 rows each after 5 tokens, of which
the second's first 2 are padding:

>>> plan = AttentionPlan.of_batch(2, 3, context=5, starts=torch.tensor([0, 2]), device="cpu")
>>> plan.as_mask().tolist()
[[[[0, 3, 6], [5, 5, 0], [0, 2, 0], [0, 1, 2]]]]
>>> AttentionPlan.from_mask(plan.as_mask()).starts.tolist()
[0, 2]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 4  # cu_seqlens, context_lens, starts, pages


class AttentionPlan(NamedTuple):
    """Arguments that `prefill_attention` and `decode_attention` share, all int32."""

    cu_seqlens: Tensor  # (sequences + 1,)
    context_lens: Tensor  # (sequences,), slots before the first new row
    starts: Tensor  # (sequences,), first visible slot
    pages: Tensor  # (sequences,), 0 .. sequences - 1: a block table of one page each

    @classmethod
    def of_batch(
        cls,
        batch: int,
        tokens: int,
        *,
        context: int | Tensor,
        starts: Tensor | None,
        device: torch.device,
    ) -> AttentionPlan:
        """Each row of a batch is one sequence of `tokens` new rows after `context` slots."""
        pages = torch.arange(batch + 1, device=device, dtype=torch.int32)
        zeros = torch.zeros_like(pages[:-1])
        context_lens = zeros + context
        starts = zeros if starts is None else starts.int()
        return cls(pages * tokens, context_lens.int(), starts, pages[:-1])

    @classmethod
    def of_packed(cls, begins: Tensor) -> AttentionPlan:
        """Rows of several sequences lie one behind the other, without a cache.

        Args:
            begins: (rows,), bool, where a row is the first of its sequence.
        """
        rows = len(begins)
        places = torch.arange(rows, device=begins.device, dtype=torch.int32)
        offsets = torch.where(begins, places, rows).sort().values
        if not torch.compiler.is_compiling():
            offsets = offsets[: int(begins.sum())]
        # Compiled, the number of sequences is unknown: those too many have no rows.
        zeros = torch.zeros_like(offsets)
        pages = torch.arange(len(offsets), device=begins.device, dtype=torch.int32)
        return cls(functional.pad(offsets, (0, 1), value=rows), zeros, zeros, pages)

    def as_mask(self) -> Tensor:
        """(1, 1, 4, sequences + 1), int32."""
        rows = (self.cu_seqlens, *(functional.pad(row, (0, 1)) for row in self[1:]))
        return torch.stack(rows)[None, None]

    @classmethod
    def from_mask(cls, mask: Tensor) -> AttentionPlan:
        """The plan that became `mask`.

        Raises:
            ValueError: it is a mask that somebody else made.
        """
        if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[2] != ROWS:
            raise ValueError(
                'attn_implementation="mistral_kernels": attention_mask must be (batch, tokens) of 0'
                f" and 1, or None, got {mask.dtype} of shape {tuple(mask.shape)}; a mask of your"
                ' own, as a vision tower has one, needs attn_implementation="sdpa" (for the text'
                ' part alone: attn_implementation={"text_config": "mistral_kernels"})'
            )
        cu_seqlens, *others = mask[0, 0].unbind()
        return cls(cu_seqlens, *(row[:-1] for row in others))


def require(condition: Tensor, message: str) -> None:
    """Refuses values that a kernel would misread.

    It waits for the device, as transformers' own mask functions do. In a graph, compiled or
    captured, which nobody can wait in, the check becomes part of the graph.
    """
    capturing = condition.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)

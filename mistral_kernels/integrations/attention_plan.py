"""What our mask function gives transformers in place of a mask: a few integers a sequence.

transformers hands its attention mask from the mask function, past caches and layers, to the
attention function without looking into it, as long as it is a tensor of four dimensions. Ours holds
what the ops want to know: where each sequence's rows begin, how many tokens came before them, and
the first token that padding leaves visible. Two sequences of 3 rows each after 5 tokens, of which
the second's first 2 are padding:

>>> plan = AttentionPlan.of_batch(2, 3, context=5, starts=torch.tensor([0, 2]), device="cpu")
>>> plan.as_mask().tolist()
[[[[0, 3, 6], [5, 5, 0], [0, 2, 0], [0, 1, 0]]]]
>>> AttentionPlan.from_mask(plan.as_mask()).starts.tolist()
[0, 2]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mistral_kernels.ops.dispatch import BoundOp

NAME = "mistral_kernels"
SWITCH = f'attn_implementation="{NAME}"'
ROWS = 4  # cu_seqlens, context_lens, starts, pages
# A layer's arguments fit once `_check` has seen them: one look, where the public functions check
# every argument of every call.
DECODE = BoundOp("decode_attention", "auto")
PREFILL = BoundOp("prefill_attention", "auto")
NO_TABLES = (None, None, False)  # cos, sin, interleaved: transformers has rotated already
NOT_QUANTISED = (None, None)  # k_scale, v_scale

Ring = tuple[Tensor, Tensor, Tensor]  # k_cache, v_cache, block_table


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
        end = torch.full_like(offsets[:1], rows)
        return cls(torch.cat((offsets, end)), zeros, zeros, pages)

    def as_mask(self, window: int | None = None) -> Tensor:
        """(1, 1 + window, 4, sequences + 1), int32, the same memory for all of the window.

        Some models tell a layer's window to its mask alone; a shape is known without the device.
        """
        rows = (self.cu_seqlens, *(functional.pad(row, (0, 1)) for row in self[1:]))
        mask = torch.stack(rows)[None, None].expand(1, 1 + (window or 0), -1, -1)
        if not torch.compiler.is_compiling():
            mask.plan = self  # for the layers that get this very tensor; others read it
        return mask

    @classmethod
    def behind(cls, mask: Tensor | None) -> AttentionPlan | None:
        """The plan that became `mask`, if this is the very tensor."""
        return getattr(mask, "plan", None)

    @staticmethod
    def window_of(mask: Tensor) -> int | None:
        """The window that `as_mask` was given."""
        return mask.shape[1] - 1 or None

    @classmethod
    def from_mask(cls, mask: Tensor) -> AttentionPlan:
        """The plan that became `mask`.

        Raises:
            ValueError: it is a mask that somebody else made.
        """
        if (plan := cls.behind(mask)) is not None:
            return plan
        if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[2] != ROWS:
            raise ValueError(
                f"{SWITCH}: attention_mask must be (batch, tokens) of 0 and 1, or None,"
                f" got {mask.dtype} of shape {tuple(mask.shape)}; a mask of your own, as a vision"
                ' tower has one, needs "sdpa" (for the text part alone:'
                ' attn_implementation={"text_config": "mistral_kernels"})'
            )
        cu_seqlens, *others = mask[0, 0].unbind()
        return cls(cu_seqlens, *(row[:-1] for row in others))

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        ring: Ring | None,
        *,
        window: int | None,
        scale: float | None,
        causal: bool = True,
        decode: BoundOp | None = None,
    ) -> Tensor:
        """Attention of packed rows, over the ring, new keys and values, or both.

        Args:
            q, k, v: (rows, heads, head_dim), as `packed` makes them; k and v may be None: in the
                ring already.
            ring: pages and their table; None: k and v are all there is.
            window, scale, causal: as for `prefill_attention`.
            decode: `decode_attention`, bound to what serves it for this ring; None: each call
                chooses.

        Returns:
            (rows, q_heads, head_dim).

        Raises:
            ValueError: heads that the ops do not have.
        """
        _check(q, *((k, v) if ring is None else ring[:2]), window)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if ring is not None and len(q) == len(self.starts):
            tables = (*NO_TABLES, window, self.starts, None, scale, *NOT_QUANTISED, None, False)
            decode = DECODE if decode is None else decode
            return decode(q, k, v, *ring, self.context_lens, *tables)[0]
        past = (None, None, None, None) if ring is None else (*ring, self.context_lens)
        how = (self.starts, window, causal, scale, *NOT_QUANTISED, False)
        return PREFILL(q, k, v, self.cu_seqlens, *past, *how)[0]


def packed(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (batch * tokens, heads, head_dim)."""
    x = x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    """k and v are the new ones, or a ring's pages: heads and head_dim come last in both."""
    same = q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if not same or k.shape[-2] != v.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{SWITCH}: query, key and value must have one dtype and head_dim, and query a multiple"
            f" of key's heads, got (heads, head_dim) {tuple(q.shape[-2:])}, {tuple(k.shape[-2:])},"
            f" {tuple(v.shape[-2:])} of {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(f"{SWITCH}: sliding_window must be >= 1 or None, got {window}")


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


def refuse_gradient(*tensors: Tensor) -> None:
    """Refuses autograd where keys lie in a cache, whose writes it would not see."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{SWITCH} has no gradient through a filled cache: call the model with use_cache=False,"
            " or under torch.no_grad()"
        )

"""A batch of sequences caught at one call of attention: their histories, the ring, what to expect.

Each sequence is one list of keys and values by position. The first `context_lens[b]` of them went
through the ring of `tests/ring.py`; the rest are the call's own tokens, views of one qkv tensor.
The expectation never looks at the ring: it knows only which positions a ring of that capacity still
holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import oracle
import peer
import pytest
import torch
from ring import Ring, empty_ring, stored
from shapes import Chunk, Heads
from torch import Tensor

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

SMALL = Heads(4, 2, 16)
MAX_POSITIONS = 40  # rows of the rotary tables


@dataclass
class Scene:
    """One call of attention, and all that was ever fed to its sequences."""

    chunk: Chunk
    qkv: Tensor
    past_k: list[Tensor]
    past_v: list[Tensor]
    heads: Heads
    ring: Ring

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.chunk.seqlens)]

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of the new tokens, views of the qkv tensor."""
        q_heads, kv_heads, _ = self.heads
        return self.qkv.split((q_heads, kv_heads, kv_heads), 1)

    def packing(self) -> dict[str, Tensor]:
        return {"cu_seqlens": self.int32(self.offsets), **self.context()}

    def context(self) -> dict[str, Tensor]:
        return {"context_lens": self.int32(self.chunk.context_lens)}

    def visibility(self) -> dict:
        starts = None if self.chunk.starts is None else self.int32(self.chunk.starts)
        return {"window": self.chunk.window, "starts": starts}

    def int32(self, values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.qkv.device)

    def prefill(self, **changes) -> tuple[Tensor, Tensor]:
        """Run prefill_attention on the ring and the new tokens."""
        q, k, v = self.parts()
        call = {"q": q, "k": k, "v": v, **self.packing(), **self.ring.arguments()}
        return ops.prefill_attention(**{**call, **self.visibility(), **changes})

    def prefill_alone(self, **changes) -> tuple[Tensor, Tensor]:
        """Run prefill_attention without a cache, on the new tokens only."""
        q, k, v = self.parts()
        call = {"q": q, "k": k, "v": v, "cu_seqlens": self.int32(self.offsets)}
        return ops.prefill_attention(**{**call, **self.visibility(), **changes})

    def decode(self, **changes) -> tuple[Tensor, Tensor]:
        """Run decode_attention on the ring and one new token a sequence, rotated already."""
        if changes.get("backend") == "cuda":
            self._skip_what_cuda_refuses()
        q, k, v = self.parts()
        call = {"q": q, "k": k, "v": v, "positions": self.int32(self.chunk.context_lens)}
        return ops.decode_attention(
            **{**call, **self.ring.arguments(), **self.visibility(), **changes}
        )

    def _skip_what_cuda_refuses(self) -> None:
        # Many scenes have small pages, so that little data crosses many edges.
        facts = {"head_dim": self.heads.head_dim, "page_size": self.ring.k_cache.shape[1]}
        if reason := dispatch.OPS["decode_attention"]["cuda"].refuses(facts):
            pytest.skip(f"the CUDA kernel: {reason}")

    def histories(self, *, stored_first: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each sequence's keys and values by position, as the cache gives them back.

        New tokens are exact unless they were stored first: decode attends what it stored, prefill
        its inputs.
        """
        dtype = self.ring.k_cache.dtype
        for b, (begin, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            pasts = (self.past_k[b], self.ring.k_scale), (self.past_v[b], self.ring.v_scale)
            k, v = (
                torch.cat(
                    (
                        stored(past, scale, dtype),
                        stored(new[begin:end], scale if stored_first else None, dtype),
                    )
                )
                for (past, scale), new in zip(pasts, self.parts()[1:], strict=True)
            )
            yield k, v

    def attend(
        self, attention: Callable, *, stored_first: bool = False, **how
    ) -> tuple[Tensor, Tensor]:
        """Work each sequence by `attention` (of `oracle` or `peer`), all positions spelled out."""
        q, outs, lses = self.parts()[0], [], []
        for b, (keys, values) in enumerate(self.histories(stored_first=stored_first)):
            context, tokens = self.chunk.context_lens[b], self.chunk.seqlens[b]
            start = 0 if self.chunk.starts is None else self.chunk.starts[b]
            written = len(keys) if stored_first else context
            held = max(start, written - self.ring.capacity, 0)
            positions = list(range(held, len(keys)))
            out, lse = attention(
                q[self.offsets[b] : self.offsets[b + 1]],
                keys[held:],
                values[held:],
                list(range(context, context + tokens)),
                positions,
                **{"window": self.chunk.window, **how},
            )
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def exact(self, **how) -> tuple[Tensor, Tensor]:
        """What the call should return, in float64."""
        return self.attend(exact_attention, **how)

    def plain(self, **how) -> tuple[Tensor, Tensor]:
        """What plain torch returns in the tensors' dtype."""
        return self.attend(peer_attention, **how)


def exact_attention(q, k, v, *positions, **how) -> tuple[Tensor, Tensor]:
    """`oracle.attention` of tensors."""
    results = oracle.attention(*map(oracle.f64, (q, k, v)), *positions, **how)
    return tuple(torch.from_numpy(result) for result in results)


def peer_attention(q, k, v, *positions, **how) -> tuple[Tensor, Tensor]:
    """`peer.attention`, with keys that the cache gave back in float64 rounded to q's dtype."""
    return peer.attention(q, k.to(q.dtype), v.to(q.dtype), *positions, **how)


def make_scene(
    chunk: Chunk,
    *,
    heads: Heads = SMALL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **kind,
) -> Scene:
    """Draw the histories and write their cached part to a ring.

    Positions before a sequence's start were never written: their slots keep the poison.

    Args:
        kind: `layout`, and for a quantised cache `dtype` as `cache_dtype`, `k_scale`, `v_scale`.
    """
    q_heads, kv_heads, head_dim = heads

    def draw(tokens: int, count: int) -> Tensor:
        return torch.randn(tokens, count, head_dim, device=device).to(dtype)

    qkv = draw(sum(chunk.seqlens), q_heads + 2 * kv_heads)
    past_k = [draw(tokens, kv_heads) for tokens in chunk.context_lens]
    past_v = [draw(tokens, kv_heads) for tokens in chunk.context_lens]
    kind = {"dtype": kind.pop("cache_dtype", dtype), "device": device, **kind}
    batch = len(chunk.seqlens)
    ring = empty_ring(batch, chunk.pages_per_seq, chunk.page_size, kv_heads, head_dim, **kind)
    scene = Scene(chunk, qkv, past_k, past_v, heads, ring)
    for b, context in enumerate(chunk.context_lens):
        start = 0 if chunk.starts is None else chunk.starts[b]
        ring.fill(b, past_k[b], past_v[b], start, context)
    return scene


def make_step(chunk: Chunk, **kind) -> Scene:
    """Make a scene whose ring has a page for every new token, as an allocator sees to it."""
    scene = make_scene(chunk, **kind)
    for b, (context, tokens) in enumerate(zip(chunk.context_lens, chunk.seqlens, strict=True)):
        for position in range(context, context + tokens):
            scene.ring.place(b, position)
    return scene


def rope_tables(head_dim: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Return cos, sin and q_scale; float64 for float64 tensors, else float32."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(MAX_POSITIONS, dtype=torch.float64), frequencies)
    scale = 1 + 0.1 * torch.log(1 + torch.floor(torch.arange(MAX_POSITIONS) / 8))
    named = {"cos": angles.cos(), "sin": angles.sin(), "q_scale": scale}
    return {name: value.to(device, dtype) for name, value in named.items()}

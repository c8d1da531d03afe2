"""store_kv_, prefill_attention and decode_attention together on one ring, as a model uses them."""

from dataclasses import replace

import pytest
import torch
from scene import Scene, make_scene, make_step
from shapes import Chunk
from tolerance import assert_close

from mistral_kernels import ops

OP = "prefill_attention"
# Chunk lengths of two sequences, step by step: ragged, joining late, idle, longer than the window.
SCHEDULES = {
    "token by token": [(1, 1)] * 20,
    "chunks that cross the window": [(5, 3), (7, 9), (4, 0), (1, 1), (9, 12)],
    "chunks as long as the window": [(8, 8), (8, 8), (8, 1)],
    "one chunk, then tokens": [(19, 6)] + [(1, 1)] * 6,
    "the second joins late": [(13, 0), (3, 0), (1, 10), (1, 1), (2, 1)],
}


def check(result: tuple[torch.Tensor, torch.Tensor], scene: Scene, **how) -> None:
    for name, got, plain, exact in zip(
        ("out", "lse"), result, scene.plain(**how), scene.exact(**how), strict=True
    ):
        assert_close(got, plain, exact, name)


def store(scene: Scene) -> None:
    """Write the scene's new tokens to its ring."""
    _, k, v = scene.parts()
    ops.store_kv_(k, v, **scene.ring.arguments(), **scene.packing())


@pytest.mark.parametrize("window", [1, 3, 8, None])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_any_schedule_equals_one_pass(schedule, window, dtype, backend, device):
    lengths = tuple(map(sum, zip(*schedule, strict=True)))
    pages = 2 if window else 9
    whole = make_scene(
        Chunk("whole", (0, 0), lengths, window, 4, pages), dtype=dtype, device=device
    )
    scene = make_step(whole.chunk, dtype=dtype, device=device)
    plain, exact = whole.plain(), whole.exact()
    done = (0, 0)
    for seqlens in schedule:
        rows = [whole.offsets[b] + done[b] + i for b in range(2) for i in range(seqlens[b])]
        chunk = scene.chunk._replace(context_lens=done, seqlens=seqlens)
        step = replace(scene, chunk=chunk, qkv=whole.qkv[rows])
        if seqlens == (1, 1):
            result = step.decode()
        else:
            result = step.prefill(backend=backend)
            store(step)
        for name, got, peer, right in zip(("out", "lse"), result, plain, exact, strict=True):
            assert_close(got, peer[rows], right[rows], f"{name} at {done}")
        done = tuple(a + b for a, b in zip(done, seqlens, strict=True))
    assert done == lengths


# Room for the window and c - 1 more, c the longest chunk: storing first destroys nothing.
LOOKAHEADS = [
    Chunk("wraps inside the chunk", (10, 3), (5, 2), 8, 4, 3),
    Chunk("no slot to spare", (17, 30), (5, 4), 8, 4, 3),
    Chunk("one token", (14, 0), (1, 1), 8, 4, 2),
    Chunk("sequence without new tokens", (14, 5), (5, 0), 8, 4, 3),
    Chunk("nothing cached", (0, 0), (9, 4), 8, 4, 4),
    Chunk("left padding", (10, 3), (5, 2), 8, 4, 3, (9, 4)),
]


@pytest.mark.parametrize("chunk", LOOKAHEADS, ids=lambda chunk: chunk.name)
def test_lookahead_stores_first(chunk, dtype, backend, device):
    scene = make_step(chunk, dtype=dtype, device=device)
    attended_first = scene.prefill(backend=backend)
    store(scene)
    stored_first = scene.prefill(k=None, v=None, backend=backend)
    check(attended_first, scene)
    check(stored_first, scene, stored_first=True)


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_rollback_of_a_draft(kept, dtype, backend, device):
    # A draft of 5 tokens is stored and all but `kept` taken back; 3 others follow in their place.
    drafted = make_step(Chunk("draft", (14,), (5,), 8, 4, 3), dtype=dtype, device=device)
    store(drafted)
    _, k, v = drafted.parts()
    chunk = drafted.chunk._replace(context_lens=(14 + kept,), seqlens=(3,))
    follow = replace(
        drafted,
        chunk=chunk,
        qkv=torch.randn(3, 8, 16, device=device).to(dtype),
        past_k=[torch.cat((drafted.past_k[0], k[:kept]))],
        past_v=[torch.cat((drafted.past_v[0], v[:kept]))],
    )
    for position in range(14 + kept, 17 + kept):
        follow.ring.place(0, position)
    check(follow.prefill(backend=backend), follow)
    store(follow)
    check(follow.prefill(k=None, v=None, backend=backend), follow, stored_first=True)


def test_decode_equals_prefill_of_one_token(dtype, backend, device):
    chunk = Chunk("one token", (0, 3, 8, 29), (1, 1, 1, 1), 8, 4, 2, (0, 0, 2, 25))
    scene = make_step(chunk, dtype=dtype, device=device)
    prefilled = scene.prefill(backend=backend)
    decoded = scene.decode()
    check(prefilled, scene)
    check(decoded, scene)

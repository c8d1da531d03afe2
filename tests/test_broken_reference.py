"""Breaks the reference on purpose: a comparison that lets these through would be worth nothing."""

import oracle
import peer
import pytest
import torch
from routed import make_call
from scene import Scene, make_scene, make_step, rope_tables
from shapes import Chunk
from tolerance import assert_close

from mistral_kernels import ops

LOW_PRECISION_TOO = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WRAPS = Chunk("wraps", (6, 14), (3, 4), 8, 4, 2)
STEP = Chunk("step", (9, 20, 7), (1, 1, 1), 8, 4, 2)


def notices(result, scene: Scene, **how) -> bool:
    """Tell whether the comparison of out and lse with the oracle fails."""
    try:
        for got, plain, exact in zip(result, scene.plain(**how), scene.exact(**how), strict=True):
            assert_close(got, plain, exact, "broken")
    except AssertionError:
        return True
    return False


@LOW_PRECISION_TOO
def test_window_off_by_one(dtype):
    scene = make_scene(WRAPS._replace(pages_per_seq=3), dtype=dtype)
    assert not notices(scene.prefill(), scene)
    for window in (7, 9):
        assert notices(scene.prefill(window=window), scene)


@LOW_PRECISION_TOO
def test_window_off_by_one_in_decode(dtype):
    scene = make_step(STEP._replace(pages_per_seq=3), dtype=dtype)
    assert not notices(scene.decode(), scene, stored_first=True)
    for window in (7, 9):
        assert notices(scene.decode(window=window), scene, stored_first=True)


@LOW_PRECISION_TOO
def test_swapped_heads(dtype):
    scene = make_scene(WRAPS, dtype=dtype)
    out, lse = scene.prefill()
    assert notices((out.flip(1), lse), scene)
    assert notices((out, lse.flip(1)), scene)
    q, k, v = scene.parts()
    # Query heads dealt to kv heads in turn (0, 1, 0, 1) instead of in groups (0, 0, 1, 1).
    dealt, dealt_lse = scene.prefill(q=q[:, [0, 2, 1, 3]])
    assert notices((dealt[:, [0, 2, 1, 3]], dealt_lse[:, [0, 2, 1, 3]]), scene)


@LOW_PRECISION_TOO
def test_positions_off_by_one(dtype):
    scene = make_scene(WRAPS._replace(pages_per_seq=3), dtype=dtype)
    late = scene.int32([context + 1 for context in WRAPS.context_lens])
    scene.ring.block_table[scene.ring.block_table < 0] = 0
    assert notices(scene.prefill(context_lens=late), scene)


@LOW_PRECISION_TOO
def test_one_key_forgotten_in_a_long_window(dtype):
    # 1 of 200 keys: the smallest mistake there is, far below what an eye sees in an output.
    scene = make_scene(Chunk("long", (0,), (260,), 200, 16, 1), dtype=dtype)
    assert not notices(scene.prefill_alone(), scene)
    assert notices(scene.prefill_alone(window=199), scene)


@LOW_PRECISION_TOO
def test_half_split_instead_of_interleaved(dtype):
    x, positions = torch.randn(5, 2, 16).to(dtype), torch.arange(3, 8, dtype=torch.int32)
    tables = rope_tables(16, dtype, "cpu")
    how = {name: tables[name] for name in ("cos", "sin")}
    arrays = {name: oracle.f64(table) for name, table in how.items()}
    exact = oracle.rope(oracle.f64(x), **arrays, positions=positions.tolist(), interleaved=True)
    plain = peer.rope(x, **how, positions=positions, interleaved=True)
    right, _ = ops.rope(x, x, **how, positions=positions, interleaved=True)
    wrong, _ = ops.rope(x, x, **how, positions=positions, interleaved=False)
    assert_close(right, plain, torch.from_numpy(exact), "interleaved")
    with pytest.raises(AssertionError, match="half-split"):
        assert_close(wrong, plain, torch.from_numpy(exact), "half-split")


@LOW_PRECISION_TOO
def test_top_1_instead_of_top_2(dtype):
    call = make_call(9, 96, 160, 8, 2, dtype=dtype)
    exact = torch.from_numpy(oracle.expert_mlp(**{k: oracle.f64(t) for k, t in call.items()}))
    plain = peer.expert_mlp(**call)
    assert_close(ops.expert_mlp(**call), plain, exact, "top-2")
    one = {name: call[name][:, :1].contiguous() for name in ("weights", "expert_ids")}
    swapped = call["w13"].roll(160, dims=1)
    broken = {
        "top-1": {**call, **one},
        "one expert at full weight": {**call, **one, "weights": torch.ones_like(one["weights"])},
        "up before gate": {**call, "w13": swapped},
        "slots swapped": {**call, "weights": call["weights"].flip(1)},
    }
    for mistake, arguments in broken.items():
        with pytest.raises(AssertionError, match=mistake):
            assert_close(ops.expert_mlp(**arguments), plain, exact, mistake)

"""How decode_attention cuts its keys, and how large its workspace has to be for that."""

import pytest
import ring
import torch
from checkpoints import tiny_config
from shapes import Heads

from mistral_kernels.kernels import key_splits
from mistral_kernels.model.cache import KVCache
from mistral_kernels.ops.decode_attention import decode_attention_workspace_bytes

pytestmark = pytest.mark.interpreter


def needed(pairs, group, width, block_n, slots) -> int:
    """Bytes that one call asks for, with groups in parts of up to 8 heads."""
    parts = -(-group // 8)
    cut = key_splits.plan(pairs * parts, width, block_n, slots)
    return key_splits.workspace_bytes(pairs * parts, cut.splits, -(-group // parts), 128)


@pytest.mark.parametrize("slots", [None, 132, 216, 264])
@pytest.mark.parametrize("group", [1, 4, 6, 9, 12, 17])
@pytest.mark.parametrize("width", [1, 65, 300, 4096, 100_000])
def test_a_largest_workspace_is_enough_for_fewer_rows_too(width, group, slots):
    for most in (1, 8, 64, 300):
        size = key_splits.enough_workspace(most, group, 128, width, slots)
        for pairs in {1, 2, 3, most // 3, most // 2, most - 1, most} - {0}:
            for block_n in (16, 32, 64):
                assert needed(min(pairs, most), group, width, block_n, slots) <= size


def test_it_is_not_much_more_than_one_call_asks_for():
    for pairs in (8, 64):
        size = key_splits.enough_workspace(pairs, 4, 128, 4096, 264)
        assert size <= 1.3 * needed(pairs, 4, 4096, 64, 264)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
def test_the_backend_that_will_serve_decides(backend):
    q_heads, kv_heads, head_dim = Heads(8, 2, 16)
    cache = ring.empty_ring(3, 5, 512, kv_heads, head_dim)

    def size(**changes) -> int:
        how = {"q_heads": q_heads, "window": 2000, "dtype": torch.float32, "backend": backend}
        return decode_attention_workspace_bytes(
            cache.k_cache, cache.block_table, **{**how, **changes}
        )

    assert bool(size()) == (backend == "triton")
    if backend == "triton":
        assert size(window=1) < size() < size(window=None) == size(window=2560)
        assert size(dtype=torch.float64) == 0, "only the reference serves float64"


def test_a_cache_s_workspace_follows_its_widest_layer():
    def workspace(windows, backend="triton"):
        config = tiny_config(windows=windows, layers=len(windows))
        place = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "backend": backend}
        first, *others = (layer.workspace for layer in KVCache(config, 2, 2048, **place).layers)
        assert all(other is first for other in others)
        return first

    both = workspace((64, None))
    assert len(both) == len(workspace((None,))) > len(workspace((64,)))
    assert not both.any() and workspace((64,), "cpu") is None


@pytest.mark.parametrize("slots", [None, 216, 264])
@pytest.mark.parametrize("block_n", [16, 64])
def test_the_plan_covers_every_position(block_n, slots):
    for pairs, width in ((1, 1), (8, 4096), (3, 65), (64, 4097), (256, 100_000), (5000, 700)):
        cut = key_splits.plan(pairs, width, block_n, slots)
        assert 1 <= cut.splits <= cut.most_splits <= 64
        for position in (0, 1, block_n, width - 2, width - 1, width, 3 * width + 5, 3 * width + 6):
            first = max(position - width + 1, 0)
            tiles = max(-(-position // block_n) - first // block_n, 0)
            per_split = max(cut.tiles_at_least, -(-tiles // cut.most_splits))
            assert -(-tiles // per_split) <= cut.splits


def test_a_workspace_holds_counters_and_partials_apart():
    for pairs, splits, group, head_dim in ((1, 2, 1, 1), (7, 3, 5, 80), (5000, 2, 1, 16)):
        size = key_splits.workspace_bytes(pairs, splits, group, head_dim)
        first = key_splits.counter_share(size)
        assert first % 16 == 0 and first >= 4 * pairs
        assert size - first >= 4 * pairs * splits * group * (head_dim + 2)

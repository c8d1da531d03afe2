"""What fits the tiles of the Triton attention kernels, and that these fit a GPU."""

import itertools

import pytest
import torch

from mistral_kernels.ops import dispatch

pytestmark = pytest.mark.interpreter
OPS = ("prefill_attention", "prefill_attention_backward", "decode_attention")
DTYPES = (torch.float32, torch.bfloat16)
ARCHS = ((8, 0), (8, 6), (8, 7), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("head_dim", "fact"), [(256, "head_dim"), (256, "group"), (128, "group")])
def test_heads_that_fit(head_dim, fact, op):
    group = 32 if head_dim == 256 or op == "decode_attention" else 64
    fits = {"head_dim": head_dim, "group": group}
    too_large = fits[fact] + 1
    call = {"device_type": "cpu", "dtype": torch.bfloat16, "backend": "triton"}
    assert dispatch.choose(op, facts=tuple(fits.items()), **call) == "triton"
    facts = tuple((fits | {fact: too_large}).items())
    with pytest.raises(ValueError, match=f"{op}: .*{fact} up to {fits[fact]}.* got {too_large}"):
        dispatch.choose(op, facts=facts, **call)
    assert dispatch.prefer(op, facts=facts, **call) != "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS, ids=str)
def test_tiles_of_prefill_fit(arch, dtype):
    from mistral_kernels.kernels import prefill_attention as kernel
    from mistral_kernels.kernels.attention_tiles import max_group
    from mistral_kernels.kernels.processor import shared_bytes

    for head_dim, rows, cache in itertools.product(
        (1, 80, 128, 256), (1, 17, 10**6), ({}, {"quantised": True}, {"stored": True})
    ):
        for group in (1, 7, max_group(head_dim)):
            config = kernel.tile_config(head_dim, group, rows, dtype, arch, **cache)
            block_m, block_n, block_d = (config[f"BLOCK_{name}"] for name in "MND")
            assert block_m >= max(group, 16) and block_d >= max(head_dim, 16)
            assert kernel.SPLIT_KEYS % block_n == 0
            keys = 2 * config["num_stages"] * block_n
            assert (block_m + keys) * block_d * dtype.itemsize <= shared_bytes(arch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS, ids=str)
def test_tiles_of_the_backward_fit(arch, dtype):
    from mistral_kernels.kernels import prefill_attention_backward as kernel
    from mistral_kernels.kernels.attention_tiles import max_group
    from mistral_kernels.kernels.processor import shared_bytes

    for head_dim, keys_stay in itertools.product((1, 80, 128, 256), (False, True)):
        for group in (1, 7, max_group(head_dim)):
            config = kernel.tile_config(head_dim, group, dtype, arch, keys_stay=keys_stay)
            block_m, block_n, block_d = (config[f"BLOCK_{name}"] for name in "MND")
            assert block_m >= max(group, 16) and block_n >= 16 and block_d >= max(head_dim, 16)
            moves = block_m if keys_stay else block_n
            rows = 2 * (block_m + block_n) + 2 * moves * (config["num_stages"] - 1)
            assert rows * block_d * dtype.itemsize <= shared_bytes(arch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS, ids=str)
def test_two_blocks_of_decode_fit(arch, dtype):
    from mistral_kernels.kernels import decode_attention as kernel
    from mistral_kernels.kernels.processor import shared_bytes

    for head_dim, cache_dtype, paged in itertools.product(
        (1, 80, 128, 256), (dtype, torch.int8), (False, True)
    ):
        config = kernel.tile_config(head_dim, 4, 16 * paged, dtype, cache_dtype, arch)
        block_n, stages = config["BLOCK_N"], config["num_stages"] - 1
        stages = stages // 2 if paged else stages
        expanded = dtype == torch.float32 and cache_dtype != dtype
        row_bytes = stages * cache_dtype.itemsize + dtype.itemsize * expanded
        assert block_n >= 16 and stages >= 1
        # One stage of wide rows is more than half of 99 KB.
        room = shared_bytes(arch) // (1 if stages == 1 else 2)
        assert 2 * block_n * config["BLOCK_D"] * row_bytes <= room


def test_keys_are_cut_into_no_more_splits_than_are_busy():
    from mistral_kernels.kernels.attention_combine import SPLIT_KEYS, cut_keys

    # 33 blocks of 2 for 132 multiprocessors; the ring bounds the grid alone, a short one to none.
    assert cut_keys(2**30, 10**6, 2, 132) == (64, 64, SPLIT_KEYS)
    assert cut_keys(4099, 10**6, 8, 132) == (16, 16, SPLIT_KEYS)
    assert cut_keys(4099, 700, 8, 132) == (4, 16, SPLIT_KEYS)
    assert cut_keys(4099, 10**6, 67, 132) == (1, 1, 0)
    assert cut_keys(SPLIT_KEYS, 10**6, 1, 132) == (1, 1, 0)

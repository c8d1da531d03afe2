"""expert_mlp's Triton kernels in Triton's interpreter, in tiles that few tokens already cross.

Run with TRITON_INTERPRET=1 set before the process starts: `TRITON_INTERPRET=1 pytest -m
interpreter`. `test_expert_mlp.py` runs the same backend there in the tiles that are shipped.
"""

import sys
from types import SimpleNamespace

import pytest
import shapes
import torch
from routed import check, deal, make_call
from tolerance import assert_same
from triton import next_power_of_2

from mistral_kernels.ops import dispatch, expert_mlp

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
DTYPES = pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES, ids=str)
MODULE = sys.modules["mistral_kernels.ops.expert_mlp"]


@pytest.fixture
def kernel(monkeypatch):
    """The file of the steps; tiles of 4 rows, or all of few tokens, 8 columns and 16 of k."""
    from mistral_kernels.kernels import expert_down, expert_up
    from mistral_kernels.kernels import expert_steps as kernel
    from mistral_kernels.kernels.expert_tiles import tiles_for

    def small(rows, *arguments) -> dict[str, int]:
        tiles = {"BLOCK_M": next_power_of_2(rows), "BLOCK_N": 8, "BLOCK_K": 16, "GROUP_M": 2}
        return tiles_for(rows, *arguments) | tiles

    for step in (expert_up, expert_down):
        monkeypatch.setattr(step, "tile_config", small)
    monkeypatch.setattr(kernel, "expert_rows", lambda *_: 4)
    return kernel


def check_triton(call):
    check(expert_mlp(**call, backend="triton"), call)


# Around a tile of rows; several tiles of one expert, more than GROUP_M; nothing at all.
ROWS = [(dtype, [3, 4, 5, 0]) for dtype in dispatch.KERNEL_DTYPES]
ROWS += [(torch.float32, rows) for rows in ([0, 0, 17, 1], [8, 0, 0, 9], [1, 1, 1, 1], [0] * 4)]


@pytest.mark.parametrize(("dtype", "rows"), ROWS, ids=str)
def test_planned_tiles(dtype, rows, kernel, monkeypatch):
    monkeypatch.setattr(kernel, "FEW_TOKENS", 0)
    check_triton(deal(make_call(10, 20, 18, 4, 2, dtype=dtype), rows))


# hidden and ffn_dim around a tile of columns (8; 4 for w13) and of k (16).
SIZES = [(dtype, (17, 33)) for dtype in dispatch.KERNEL_DTYPES]
SIZES += [(torch.float32, sizes) for sizes in [(7, 3), (8, 4), (9, 5), (16, 16)]]


@pytest.mark.parametrize("few", [0, 32], ids=["planned", "few"])
@pytest.mark.parametrize(("dtype", "sizes"), SIZES, ids=str)
def test_columns_and_k_around_a_tile(dtype, sizes, few, kernel, monkeypatch):
    monkeypatch.setattr(kernel, "FEW_TOKENS", few)
    call = make_call(3, *sizes, 4, 2, dtype=dtype)
    # Rows that start at any element, with NaN behind their ends.
    for name in ("x", "w13", "w2"):
        wide = torch.nn.functional.pad(call[name], (1, 3), value=torch.nan)
        call[name] = wide[..., 1:-3]
    call |= {name: shapes.laid_out(call[name], "padded") for name in ("weights", "expert_ids")}
    check_triton(call)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 5, 32])
def test_few_tokens_find_their_experts(tokens, dtype, kernel):
    # 5 tokens have more pairs than experts; fewer are found by pair. Slots repeat and skip experts.
    call = make_call(tokens, 24, 20, 9, 2, dtype=dtype)
    call["expert_ids"] = torch.tensor([[7, 7], [-1, 9], [7, 2], [-9, 0], [2, 5]], dtype=torch.int32)
    call["expert_ids"] = call["expert_ids"].repeat(7, 1)[:tokens].contiguous()
    used = torch.isin(torch.arange(9), call["expert_ids"])
    call["w13"][~used], call["w2"][~used] = torch.nan, torch.nan
    check_triton(call)


@pytest.mark.parametrize("ffn_dim", [63, 64, 65, 127, 128, 129, 640])
def test_few_tokens_cut_the_down_projection(ffn_dim, kernel):
    from mistral_kernels.kernels import expert_down

    config = expert_down.tile_config(2, torch.float32, (8, 0))
    k_split = expert_down.split_config(2, 1, 2, 16, ffn_dim, config)
    splits = -(-ffn_dim // k_split)
    assert k_split % config["BLOCK_K"] == 0 and splits == min(max(-(-ffn_dim // 16) // 4, 1), 8)
    if ffn_dim < 200:
        check_triton(make_call(2, 16, ffn_dim, 2, 1))


def test_nan_rows_stay_alone(kernel, monkeypatch):
    call = make_call(6, 24, 20, 3, 2, dtype=torch.bfloat16)
    call["expert_ids"][1, 0] = -1  # its empty slot must not pick up another token's NaN
    for few in (0, 32):
        monkeypatch.setattr(kernel, "FEW_TOKENS", few)
        clean = expert_mlp(**call, backend="triton")
        poisoned = {**call, "x": call["x"].clone()}
        poisoned["x"][[0, 5]] = torch.nan
        out = expert_mlp(**poisoned, backend="triton")
        assert out[[0, 5]].isnan().all()
        assert_same(out[1:5], clean[1:5], f"rows beside a NaN, {few}")


def test_many_tokens_are_worked_in_chunks(kernel, monkeypatch):
    call = make_call(5, 16, 8, 4, 2)
    whole = expert_mlp(**call, batch_invariant=True, backend="triton")
    for workspace in (1, 700):  # room for less than a token, for a few
        monkeypatch.setattr(MODULE, "WORKSPACE_BYTES", workspace)
        out = expert_mlp(**call, batch_invariant=True, backend="triton")
        assert_same(out, whole, f"{workspace} bytes")


def test_without_experts_every_slot_is_skipped():
    call = make_call(5, 16, 24, 1, 1)
    call["w13"], call["w2"] = call["w13"][:0], call["w2"][:0]
    assert (expert_mlp(**call, backend="triton") == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_tiles_fit_and_know_no_batch_if_invariant(arch, dtype):
    from mistral_kernels.kernels.expert_tiles import FEW_TOKENS, expert_rows, tiles_for
    from mistral_kernels.kernels.processor import shared_bytes

    for tokens in (1, 32, 33, 100, 200, 4096, 10**6):
        assert expert_rows(tokens, 2, 8, batch_invariant=True) == 64
        few = tokens <= FEW_TOKENS
        config = tiles_for(tokens if few else expert_rows(tokens, 2, 8, False), dtype, arch)
        assert config["BLOCK_M"] >= tokens or not few
        stage = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * dtype.itemsize
        assert config["num_stages"] >= 2
        assert config["num_stages"] * stage <= shared_bytes(arch)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 2), (32, 256), (33, 66), (4096, 8192)])
def test_few_tokens_are_worked_by_every_used_expert(tokens, rows):
    from mistral_kernels.kernels import expert_down, expert_up

    used = 2 if tokens == 1 else 8
    moved, flops = expert_down.work(tokens, 2, 8, 64, 48, 3, 2)
    assert moved == pytest.approx(2 * used * 64 * 48 + rows * (2 * 48 + 4 * 3 * 64), rel=1e-3)
    assert flops == 2 * tokens * 2 * 64 * 48, "those that count"
    moved, _ = expert_up.work(tokens, 2, 8, 64, 48, 2)
    assert moved == pytest.approx(2 * (2 * used * 64 * 48 + tokens * 64 + rows * 48), rel=1e-3)


@pytest.mark.parametrize(
    ("capability", "rows", "dtype", "each"),
    [
        ((9, 0), 128, torch.bfloat16, 1),  # 144 of 227 KB of shared memory
        ((9, 0), 64, torch.bfloat16, 2),  # 72 KB, 128 threads of up to 255 registers
        ((8, 0), 64, torch.bfloat16, 2),  # 72 of 163 KB
        ((12, 0), 16, torch.bfloat16, 1),  # 60 of 99 KB
        ((9, 0), 64, torch.float32, 1),  # 256 threads of up to 255 registers
    ],
)
def test_as_many_programs_as_run_at_a_time(capability, rows, dtype, each, monkeypatch):
    from mistral_kernels.kernels import expert_tiles

    monkeypatch.setattr(expert_tiles, "processor", lambda device: (capability, 100))
    x = SimpleNamespace(is_cuda=True, device="cuda", dtype=dtype)
    tiles = expert_tiles.tiles_for(rows, dtype, capability)
    assert expert_tiles.programs(x, tiles) == 100 * each

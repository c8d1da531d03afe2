"""expert_mlp_low_bit's Triton kernels in Triton's interpreter, in tiles that few tokens cross.

Run with TRITON_INTERPRET=1 set before the process starts: `TRITON_INTERPRET=1 pytest -m
interpreter`. `test_expert_mlp_low_bit.py` runs the same backend there in the shipped tiles.
"""

import sys

import pytest
import torch
from low_bit_cases import Kind
from test_expert_mlp_low_bit import check, make_call

from mistral_kernels.ops import expert_mlp_low_bit
from mistral_kernels.ops.low_bit import FP8, INT4, INT8

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
MODULE = sys.modules["mistral_kernels.ops.expert_mlp"]
KINDS = {
    "int4": Kind(INT4, 16, symmetric=False, shuffled=True),
    "int8": Kind(INT8, None, symmetric=False, shuffled=True),
    "fp8": Kind(FP8, 48),
}


@pytest.fixture
def kernel(monkeypatch):
    """The file of the steps; tiles of 4 rows, or all of few tokens, 32 columns and 64 of k."""
    from mistral_kernels.kernels import expert_down, expert_up
    from mistral_kernels.kernels import expert_steps as kernel
    from mistral_kernels.kernels.expert_tiles import tiles_for

    def small(rows, *arguments) -> dict[str, int]:
        tiles = {"BLOCK_M": max(4, rows), "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2}
        return tiles_for(rows, *arguments) | tiles

    for step in (expert_up, expert_down):
        monkeypatch.setattr(step, "tile_config", small)
    monkeypatch.setattr(kernel, "expert_rows", lambda *_: 4)
    return kernel


@pytest.mark.parametrize("few", [0, 32], ids=["planned", "few"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_columns_and_k_around_a_tile(kind, few, kernel, monkeypatch):
    monkeypatch.setattr(kernel, "FEW_TOKENS", few)
    call = make_call((4, 48, 96, 3, 2), kind)
    call["x"] = torch.nn.functional.pad(call["x"], (1, 3), value=torch.nan)[:, 1:-3]
    call["expert_ids"][:] = torch.tensor([[2, 0], [2, 2], [-1, 2], [2, 3]])
    for name in ("w13_scales", "w2_scales"):  # nobody chose expert 1
        call[name][1] = torch.nan
    check(expert_mlp_low_bit(**call, backend="triton"), call)


def test_few_tokens_cut_the_down_projection(kernel):
    from mistral_kernels.kernels import expert_down

    config = expert_down.tile_config(2, torch.float32, (8, 0), "int4")
    assert expert_down.split_config(2, 2, 2, 48, 576, config) == 320
    kind = Kind(INT4, 48, symmetric=False, shuffled=True)  # groups across the cut
    call = make_call((2, 48, 576, 2, 2), kind)
    check(expert_mlp_low_bit(**call, backend="triton"), call)


@pytest.mark.parametrize(("name", "rows"), [("int4", 32), ("fp8", 64)])
def test_a_gather_keeps_to_few_rows(name, rows, kernel, monkeypatch):
    """An address for each number of x spills where a tile has more rows (codegen: sm_90)."""
    from mistral_kernels.kernels import expert_down, expert_up

    small, asked = expert_up.tile_config, []

    def tile_config(rows, *arguments) -> dict[str, int]:
        asked.append(rows)
        return small(4, *arguments)

    for step in (expert_up, expert_down):
        monkeypatch.setattr(step, "tile_config", tile_config)
    monkeypatch.setattr(kernel, "expert_rows", lambda *_: 64)
    monkeypatch.setattr(kernel, "FEW_TOKENS", 0)
    call = make_call((2, 48, 48, 2, 1), KINDS[name])
    check(expert_mlp_low_bit(**call, backend="triton"), call)
    assert asked == [rows, rows]


def test_many_tokens_are_worked_in_chunks(kernel, monkeypatch):
    monkeypatch.setattr(MODULE, "WORKSPACE_BYTES", 1)  # room for less than a token
    call = make_call((3, 48, 48, 2, 1), KINDS["fp8"])
    check(expert_mlp_low_bit(**call, backend="triton"), call)


def test_without_experts_every_slot_is_skipped():
    call = make_call((3, 48, 48, 1, 1), KINDS["fp8"])
    for name in ("w13", "w13_scales", "w2", "w2_scales"):
        call[name] = call[name][:0]
    assert (expert_mlp_low_bit(**call, backend="triton") == 0).all()

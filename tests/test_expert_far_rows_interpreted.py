"""expert_mlp's steps on rows that begin behind element 2^31, in memory that is not touched before.

A plan of one expert that owns three rows, from row FIRST on, must do what it does from row 0 on.
"""

import pytest
import torch
from tolerance import assert_same

pytestmark = pytest.mark.interpreter
WIDE = 2**14  # columns of a tensor of many rows
FIRST = 2**17 + 1
HIDDEN, ROWS = 16, 3
TILES = {"GROUP_M": 2, "num_warps": 1, "num_stages": 1}


def behind(first: int, rows: torch.Tensor) -> torch.Tensor:
    """The rows behind `first` others, of which no page is in use; half precision, for the room."""
    memory = torch.empty(first + len(rows), rows.shape[1], dtype=rows.dtype)
    memory[first:] = rows
    return memory


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size).half()


def up(first, plan):
    from mistral_kernels.kernels.expert_up import expert_up

    gate_up, ids = behind(first, draw(ROWS, WIDE)), torch.zeros(ROWS, 1, dtype=torch.int32)
    w13 = draw(1, 2, WIDE // 2, HIDDEN)
    expert_up(draw(ROWS, HIDDEN), w13, ids, *plan, gate_up, ROWS, gate_up=True)
    return gate_up[first:]


def down(first, plan):
    from mistral_kernels.kernels.expert_down import expert_down

    inner, ids = behind(first, draw(ROWS, WIDE)), torch.zeros(ROWS, 1, dtype=torch.int32)
    slots, _ = expert_down(inner, draw(1, HIDDEN, WIDE), ids, plan[0], ROWS)
    return slots[first:]


def combine(first, plan):
    from mistral_kernels.kernels.expert_combine import expert_combine

    ids, out = torch.zeros(ROWS, 1, dtype=torch.int32), draw(ROWS, WIDE)
    places = torch.arange(first, first + ROWS, dtype=torch.int32)
    expert_combine(behind(first, draw(ROWS, WIDE)), None, ids, places, out, 1, 1)
    return out


def rows_of_x(first, plan):
    from mistral_kernels.kernels.expert_rows_backward import expert_rows_backward

    slots = behind(first, draw(ROWS, HIDDEN).float())
    d_gate_up, w13 = behind(first, draw(ROWS, WIDE)), draw(1, 2, WIDE // 2, HIDDEN)
    expert_rows_backward(d_gate_up, w13, *plan, slots, 1, 1, add=False)
    return slots[first:]


def rows_of_inner(first, plan):
    from mistral_kernels.kernels.expert_rows_backward import expert_rows_backward

    d_inner = behind(first, draw(ROWS, WIDE))
    grad, w2 = draw(ROWS, HIDDEN), draw(1, HIDDEN, WIDE)
    expert_rows_backward(grad, w2, *plan, d_inner, 1, ROWS, add=False)
    return d_inner[first:]


def matrix_w13(first, plan):
    from mistral_kernels.kernels.expert_matrix_backward import expert_matrix_backward

    d_gate_up, d_w13 = behind(first, draw(ROWS, WIDE)), draw(1, 2, WIDE // 2, HIDDEN)
    expert_matrix_backward(d_gate_up, draw(ROWS, HIDDEN), *plan, d_w13, 1)
    return d_w13


def matrix_w2(first, plan):
    from mistral_kernels.kernels.expert_matrix_backward import expert_matrix_backward

    inner, d_w2 = behind(first, draw(ROWS, WIDE)), draw(1, HIDDEN, WIDE)
    expert_matrix_backward(draw(ROWS, HIDDEN), inner, *plan, d_w2, 1)
    return d_w2


@pytest.fixture
def wide_tiles(monkeypatch):
    """Tiles as wide as all columns, so that few programs are enough."""
    from mistral_kernels.kernels import (
        expert_combine,
        expert_down,
        expert_matrix_backward,
        expert_rows_backward,
        expert_up,
    )

    wide_n = {**TILES, "BLOCK_M": 4, "BLOCK_N": WIDE, "BLOCK_K": HIDDEN}
    wide_k = {**TILES, "BLOCK_M": 4, "BLOCK_N": HIDDEN, "BLOCK_K": WIDE}
    square = {**TILES, "BLOCK_M": 512, "BLOCK_N": 512, "BLOCK_K": 4}
    monkeypatch.setattr(expert_up, "tile_config", lambda *_: wide_n)
    monkeypatch.setattr(expert_down, "tile_config", lambda *_: wide_k)
    combined = {"BLOCK": WIDE, "num_warps": 1}
    monkeypatch.setattr(expert_combine, "tile_config", lambda *_: combined)
    monkeypatch.setattr(expert_matrix_backward, "tile_config", lambda *_: square)
    by_rows = {ROWS: wide_n, 1: wide_k}
    monkeypatch.setattr(expert_rows_backward, "tile_config", lambda rows, *_: by_rows[rows])


STEPS = [up, down, combine, rows_of_x, rows_of_inner, matrix_w13, matrix_w2]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_rows_behind_2_to_the_31(step, wide_tiles):
    assert FIRST * WIDE > 2**31
    found = []
    for first in (0, FIRST):
        torch.manual_seed(0)
        starts = torch.tensor([first, first + ROWS], dtype=torch.int32)
        order = torch.zeros(first + ROWS, dtype=torch.int32)
        order[first:] = torch.arange(ROWS)
        found.append(step(first, (starts, order)))
    assert_same(found[1], found[0], step.__name__)
    assert found[0].isfinite().all() and found[0].any()

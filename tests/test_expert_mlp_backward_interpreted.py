"""Gradients of expert_mlp's Triton kernels in Triton's interpreter, in tiles of a few elements.

Run with TRITON_INTERPRET=1 set before the process starts, as `test_expert_mlp_interpreted.py`.
"""

import functools
import sys

import gradients
import pytest
import shapes
import torch
from routed import deal, every_expert_on_every_token, make_call
from tolerance import assert_same

from mistral_kernels.ops import dispatch, expert_mlp

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
SMALL = pytest.mark.usefixtures("small_tiles")
MODULE = sys.modules["mistral_kernels.ops.expert_mlp"]
TILES = {"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 1, "num_stages": 1}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows, 16 columns, 16 of k, and of matrices 32 x 16 in steps of 4 rows."""
    from mistral_kernels.kernels import expert_matrix_backward as matrix
    from mistral_kernels.kernels import expert_mlp_backward as backward
    from mistral_kernels.kernels import expert_rows_backward as rows
    from mistral_kernels.kernels import expert_up as up

    monkeypatch.setattr(up, "tile_config", lambda *_: TILES)
    monkeypatch.setattr(backward, "tile_config", lambda _: {"BLOCK": 8, "num_warps": 1})
    monkeypatch.setattr(rows, "tile_config", lambda *_: TILES)
    steps = {**TILES, "BLOCK_M": 32, "BLOCK_K": 4}
    monkeypatch.setattr(matrix, "tile_config", lambda *_: steps)


def ours(x, w13, w2, weights, expert_ids, batch_invariant=False):
    wide = weights.to(torch.promote_types(x.dtype, torch.float32))
    call = x, w13, w2, wide, expert_ids
    return expert_mlp(*call, batch_invariant=batch_invariant, backend="triton")


def check(call, dtype):
    expert_ids = call.pop("expert_ids")
    both = (
        functools.partial(run, expert_ids=expert_ids) for run in (ours, every_expert_on_every_token)
    )
    gradients.check_dtype(*both, call, dtype)


def gradients_of(call):
    inputs = {name: value for name, value in call.items() if name != "expert_ids"}
    run = functools.partial(ours, expert_ids=call["expert_ids"])
    found = gradients.gradients(run, inputs, call["x"].dtype, call["x"].dtype)
    return dict(zip(inputs, found, strict=True))


# Around a tile and a step of rows; several tiles of one expert, more than GROUP_M; all on one.
ROWS = [(dtype, [3, 4, 5, 0]) for dtype in dispatch.KERNEL_DTYPES]
ROWS += [(torch.float32, rows) for rows in ([0, 0, 9, 1], [0, 16, 0, 0], [0, 0, 0, 0])]


@SMALL
@pytest.mark.parametrize(("dtype", "rows"), ROWS, ids=str)
def test_rows_around_a_tile(dtype, rows):
    call = deal(make_call(10, 18, 17, 4, 2), rows)
    clean = {**call, **{name: call[name].nan_to_num(0) for name in ("w13", "w2")}}
    check(dict(clean), dtype)
    if dtype == torch.float32:
        found, unused = gradients_of(call), torch.tensor(rows) == 0
        for name, got in gradients_of(clean).items():
            assert_same(found[name], got, f"{name} beside NaN in unused weights")
        assert (found["w13"][unused] == 0).all() and (found["w2"][unused] == 0).all()
        skipped = (call["expert_ids"] < 0) | (call["expert_ids"] >= 4)
        assert (found["weights"][skipped] == 0).all()
        assert (found["x"][skipped.all(1)] == 0).all()


# hidden and ffn_dim around a tile of columns, a step of k, a step of d_weights. With the smallest a
# single rounding decides the error of bf16, and the comparison with torch is a matter of luck.
SIZES = [(dtype, sizes) for dtype in dispatch.KERNEL_DTYPES for sizes in [(16, 16), (33, 17)]]
SIZES += [(torch.float32, sizes) for sizes in [(1, 1), (7, 9), (16, 8), (17, 15)]]


@SMALL
@pytest.mark.parametrize(("dtype", "sizes"), SIZES, ids=str)
def test_columns_and_k_around_a_tile(dtype, sizes):
    call = make_call(3, *sizes, 3, 3)  # each token takes all experts
    # Rows that start at any element, with NaN behind their ends.
    for name in ("x", "w13", "w2"):
        wide = torch.nn.functional.pad(call[name], (1, 3), value=torch.nan)
        call[name] = wide[..., 1:-3]
    call |= {name: shapes.laid_out(call[name], "padded") for name in ("weights", "expert_ids")}
    check(call, dtype)


@SMALL
def test_slices_of_ffn_dim_change_no_bit(monkeypatch):
    call = deal(make_call(4, 17, 29, 3, 2), [5, 0, 2])
    whole = gradients_of(call)
    # A column of gate, up and d_inner takes 8 * 3 * 4 bytes: slices of 8, of 16 columns.
    for workspace in (1, 16 * 96):
        monkeypatch.setattr(MODULE, "WORKSPACE_BYTES", workspace)
        for name, got in gradients_of(call).items():
            assert_same(got, whole[name], f"{name}, {workspace} bytes")


@SMALL
def test_rows_do_not_depend_on_their_neighbours():
    call = make_call(9, 17, 9, 3, 2)
    whole = gradients_of_sum(call)
    for rows in ([4], [7, 0, 3]):
        fewer = {**call, **{name: call[name][rows] for name in ("x", "weights", "expert_ids")}}
        found = gradients_of_sum(fewer)
        for name in ("x", "weights"):
            assert_same(found[name], whole[name][rows], f"{name} of {rows}")


def gradients_of_sum(call):
    inputs = [value.detach().requires_grad_() for value in list(call.values())[:-1]]
    out = ours(*inputs, call["expert_ids"], batch_invariant=True)
    return dict(zip(call, torch.autograd.grad(out.sum(), inputs), strict=False))


def recorded(launched, step, *how, **also):
    launched.append(step.__name__)
    step(*how, **also)


@SMALL
def test_frozen_experts_have_no_gradients_to_work_out(monkeypatch):
    from mistral_kernels.kernels import expert_mlp_backward as backward

    launched = []
    steps = ("expert_matrix_backward", "expert_rows_backward", "expert_combine")
    for step in steps:
        run = functools.partial(recorded, launched, getattr(backward, step))
        monkeypatch.setattr(backward, step, run)
    call = make_call(5, 17, 9, 3, 2)
    counts = {"x": (0, 2, 1), "w13": (1, 1, 0), "w2": (1, 1, 0), "weights": (0, 1, 0)}
    for name, expected in counts.items():
        launched.clear()
        ours(**{**call, name: call[name].requires_grad_()}).sum().backward()
        assert tuple(map(launched.count, steps)) == expected, name
        call[name].requires_grad_(False)


@SMALL
def test_nan_rows_of_skipped_tokens_are_not_read():
    call = make_call(5, 16, 8, 3, 2)
    call["expert_ids"][2] = -1
    clean = gradients_of_sum(call)
    call["x"][2], call["weights"][2] = torch.nan, torch.nan
    for name, got in gradients_of_sum(call).items():
        assert_same(got, clean[name], name)


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (4, 0)])
def test_nothing_to_do_gives_zeros(tokens, experts):
    call = make_call(tokens, 8, 6, 3, 2)
    call |= {name: call[name][:experts] for name in ("w13", "w2")}
    for name, got in gradients_of_sum(call).items():
        assert_same(got, torch.zeros_like(call[name]), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_tile_configs_fit_into_shared_memory(arch, dtype):
    from mistral_kernels.kernels import expert_matrix_backward as matrix
    from mistral_kernels.kernels import expert_rows_backward as rows
    from mistral_kernels.kernels import expert_tiles
    from mistral_kernels.kernels.processor import shared_bytes

    config = matrix.tile_config(dtype, arch)
    buffers = [((config["num_stages"] + 1) // 2, config)]
    for count in (1, 16, 64, 200, 10**6):
        for add in (False, True):
            config = rows.tile_config(count, add, dtype, arch)
            buffers.append((config["num_stages"], config))
    for count, config in buffers:
        assert count >= 2
        room = shared_bytes(arch)
        assert count * expert_tiles.stage_bytes(config, dtype) < room


@pytest.mark.parametrize("pairs", [1, 1000, 8192, 10**6])
def test_slices_are_even_and_have_room(pairs):
    from mistral_kernels.kernels import expert_mlp_backward as backward

    width = backward.slice_columns(8 * pairs, 14336, 512, 2**28)
    slices, most = -(-14336 // width), max(2**28 // (8 * pairs * 512), 1) * 512
    assert width % 512 == 0 and width <= most
    assert slices == -(-14336 // most), "as few as can be"
    assert slices * (width - 512) < 14336, "as even as can be"

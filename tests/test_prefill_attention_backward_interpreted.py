"""The gradients of prefill_attention by Triton in the interpreter, on tiles that few keys cross."""

import functools

import gradients
import pytest
import torch
from shapes import LAYOUTS, Heads, laid_out
from test_prefill_attention_contract import attend, both_outputs, plain_packed
from tolerance import assert_close, assert_same

from mistral_kernels import ops

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED = Heads(4, 2, 16)


@pytest.fixture
def kernel():
    from mistral_kernels.kernels import prefill_attention_backward

    return prefill_attention_backward


@pytest.fixture
def tiles_of(kernel, monkeypatch):
    shipped = kernel.tile_config

    def patch(block_m: int, block_n: int) -> None:
        def tile_config(*call, **keys):
            config = shipped(*call, **keys) | {"BLOCK_M": block_m, "BLOCK_N": block_n}
            return config | {"SETTLED": True} if "SETTLED" in config else config  # as on sm_90

        monkeypatch.setattr(kernel, "tile_config", tile_config)

    return patch


@pytest.fixture
def tiles(tiles_of):
    tiles_of(16, 16)


def run(backend: str, offsets: list[int], **how):
    return attend(functools.partial(ops.prefill_attention, backend=backend), offsets, **how)


def inputs(tokens: int, heads: Heads = GROUPED) -> dict[str, torch.Tensor]:
    counts = {"q": heads.q_heads, "k": heads.kv_heads, "v": heads.kv_heads}
    return {name: torch.randn(tokens, count, heads.head_dim) for name, count in counts.items()}


def check(offsets: list[int], dtype: torch.dtype, heads: Heads = GROUPED, **how) -> None:
    ours, plain = run("triton", offsets, **how), attend(plain_packed, offsets, **how)
    ours, plain = map(both_outputs, (ours, plain))
    gradients.check_dtype(ours, plain, inputs(offsets[-1], heads), dtype)


# Sequences end inside, at and behind tiles; one is empty and one a single token.
OFFSETS = [0, 37, 37, 38, 54]


@pytest.mark.parametrize("window", [1, 15, 16, 17, 33, None])
def test_windows_around_tiles(window, tiles):
    check(OFFSETS, torch.float32, window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16)])
def test_tiles(block_m, block_n, dtype, tiles_of):
    tiles_of(block_m, block_n)
    check(OFFSETS, dtype, window=21)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_mask(dtype, tiles):
    check([0, 33, 36], dtype, causal=False)


@pytest.mark.parametrize("heads", [Heads(3, 1, 16), Heads(5, 1, 80), Heads(2, 1, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_heads(heads, dtype):
    check([0, 21, 40], dtype, heads, window=9)


def test_scale(tiles):
    check([0, 20], torch.float32, scale=0.9)


@pytest.mark.parametrize("causal", [True, False])
def test_starts(causal, tiles):
    offsets, given = [0, 40, 45, 50], inputs(50)
    how = {"starts": torch.tensor([18, 0, 9], dtype=torch.int32), "causal": causal}

    def gradients_by(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        function = run(backend, offsets, **how)
        return gradients.gradients(lambda q, k, v: function(q, k, v)[0], given, dtype)

    found = gradients_by("triton", torch.float32)
    peers, exact = (gradients_by("reference", x) for x in (torch.float32, torch.float64))
    for name, got, peer, right in zip("qkv", found, peers, exact, strict=True):
        assert_close(got, peer, right, f"gradient of {name}")
    assert (found[1][:18] == 0).all() and (found[1][45:] == 0).all(), "keys that none sees"


def test_padding_in_front_of_a_start_may_hold_nan(tiles):
    offsets, given = [0, 40], inputs(40)
    function = run("triton", offsets, starts=torch.tensor([18], dtype=torch.int32), window=30)

    def found() -> list[torch.Tensor]:
        return gradients.gradients(lambda q, k, v: function(q, k, v)[0][18:], given, torch.float32)

    expected = found()
    for part in given.values():
        part[:18] = torch.nan
    for name, got, want in zip("qkv", found(), expected, strict=True):
        assert_same(got[18:], want[18:], f"gradient of {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    given = inputs(20)
    function = both_outputs(run("triton", [0, 20], window=6))
    expected = gradients.gradients(function, given, torch.float32)
    leaves = [laid_out(part, layout).detach().requires_grad_() for part in given.values()]
    out = function(*leaves)
    direction = torch.arange(out.numel()).cos().view_as(out)
    for name, got, want in zip(
        "qkv", torch.autograd.grad(out, leaves, direction), expected, strict=True
    ):
        assert_same(got, want, f"gradient of {name}")


def test_two_runs_give_the_same_bits(tiles):
    def found() -> list[torch.Tensor]:
        torch.manual_seed(0)
        function = both_outputs(run("triton", OFFSETS, window=21))
        return gradients.gradients(function, inputs(OFFSETS[-1]), torch.bfloat16)

    for name, got, want in zip("qkv", found(), found(), strict=True):
        assert_same(got, want, f"gradient of {name}")


def test_a_sequence_has_the_bits_it_has_alone(tiles):
    given = inputs(OFFSETS[-1])

    def found(offsets: list[int], given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        function = run("triton", offsets, window=9, batch_invariant=True)
        return gradients.gradients(lambda q, k, v: function(q, k, v)[0][-16:], given, torch.float32)

    whole = found(OFFSETS, given)
    alone = found([0, 16], {name: part[-16:] for name, part in given.items()})
    for name, got, want in zip("qkv", alone, whole, strict=True):
        assert_same(got, want[-16:], f"gradient of {name}")


def test_no_tokens():
    found = gradients.gradients(both_outputs(run("triton", [0, 0])), inputs(0), torch.float32)
    assert [part.shape[0] for part in found] == [0, 0, 0]


def test_rows_2_gb_apart(tiles):
    apart = 2**30  # elements: the third row begins at 2^31
    memory = torch.empty(2 * apart + 64, dtype=torch.float16)
    given = {name: part.half() for name, part in inputs(3, Heads(1, 1, 16)).items()}
    function = both_outputs(run("triton", [0, 3], window=2))
    expected = gradients.gradients(function, given, torch.float16)
    wide = [memory[first:].as_strided((3, 1, 16), (apart, 16, 1)) for first in (0, 16, 32)]
    for leaf, part in zip(wide, given.values(), strict=True):
        leaf.copy_(part).requires_grad_()
    out = function(*wide)
    direction = torch.arange(out.numel()).cos().view_as(out)
    for name, got, want in zip(
        "qkv", torch.autograd.grad(out, wide, direction), expected, strict=True
    ):
        assert_same(got, want, f"gradient of {name}")

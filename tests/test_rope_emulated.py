"""The shipped csrc/cuda/rope.cu on the host emulator."""

import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from scene import rope_tables
from test_rope_interpreted import DTYPES, LAYOUTS, guarded_call, oracle_of
from tolerance import assert_close, assert_same

from mistral_kernels.ops.rope import _rotate

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def emulate(call: dict, interleaved: bool, *, in_place: bool = False, device: int = 0):
    """The turned q and k; checks that nothing else was written."""
    with GuardBands() as guard:
        q, k = (guard(call[name], mutated=in_place) for name in "qk")
        out_q, out_k = (x if in_place else guard.output(x.shape, x.dtype) for x in (q, k))
        tables = (guard(call[name]) for name in ("cos", "sin", "positions"))
        inputs = (q, k, *tables, interleaved, guard(call["q_scale"]))
        _rotate(emulated_core().rope_cuda, *inputs, device, 0, out_q=out_q, out_k=out_k)
    return out_q, out_k


def check(call: dict, interleaved: bool, turned) -> None:
    for name, got in zip("qk", turned, strict=True):
        exact, plain = oracle_of(call, name, interleaved)
        assert_close(got, plain, exact, name)
        idle = call["positions"] < 0
        assert_same(got[idle], call[name][idle], f"idle rows of {name}")


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 8, 16, 22, 32, 34, 64, 72, 80, 96, 128, 256])
def test_every_head_dim(head_dim, dtype, interleaved):
    call = guarded_call(2, 1, head_dim, dtype)
    check(call, interleaved, emulate(call, interleaved))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [6, 34, 80, 128])
def test_in_place_gives_the_same_bits(head_dim, dtype, interleaved):
    call = guarded_call(3, 2, head_dim, dtype)
    turned = emulate(call, interleaved, in_place=True)
    for got, want in zip(turned, emulate(call, interleaved), strict=True):
        assert_same(got, want, "in place")


@LAYOUTS
def test_any_order_of_threads(interleaved, orders):
    for head_dim in (34, 128):
        test_in_place_gives_the_same_bits(head_dim, torch.bfloat16, interleaved)


@LAYOUTS
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (48, 8), (33, 1)], ids=str)
def test_heads_around_a_block(heads, interleaved):
    # A block turns 16 heads of 128 in bf16; 33 and 1 leave a block of 2, 48 and 8 cross from q to
    # k within one.
    call = guarded_call(*heads, 128, torch.bfloat16)
    check(call, interleaved, emulate(call, interleaved))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_rows_give_the_bits_of_aligned_ones(dtype, interleaved):
    call = guarded_call(2, 1, 64, dtype)
    call |= {name: call[name].contiguous() for name in ("q", "k", "cos", "sin")}
    turned = emulate(call, interleaved)
    for name in ("q", "k", "cos", "sin"):
        moved = torch.nn.functional.pad(call[name], (1, 2))[..., 1:-2]
        for got, want in zip(emulate({**call, name: moved}, interleaved), turned, strict=True):
            assert_same(got, want, f"{name} from an odd column on")


@LAYOUTS
def test_without_q_scale(interleaved):
    call = guarded_call(2, 2, 32, torch.float32) | {"q_scale": None}
    check(call, interleaved, emulate(call, interleaved))


@pytest.mark.parametrize(("tokens", "q_heads", "kv_heads"), [(0, 2, 1), (2, 0, 1), (2, 0, 0)])
def test_nothing_to_turn(tokens, q_heads, kv_heads):
    q, k = torch.randn(tokens, q_heads, 8), torch.randn(tokens, kv_heads, 8)
    positions = torch.arange(tokens, dtype=torch.int32)
    call = {"q": q, "k": k, "positions": positions, **rope_tables(8, torch.float32, "cpu")}
    turned_q, turned_k = emulate(call, True)
    assert turned_q.shape == q.shape and turned_k.shape == k.shape


def test_an_unknown_device_is_an_error_that_names_the_op():
    with pytest.raises(RuntimeError, match="rope: CUDA error: cudaErrorInvalidDevice"):
        emulate(guarded_call(1, 1, 8, torch.float32), True, device=1)

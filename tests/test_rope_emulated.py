"""The shipped csrc/cuda/rope.cu on the host emulator, plainly and under sanitizers."""

import pytest
import torch
from emulator.host_build import emulated_core, missing, run_tests_sanitized
from scene import rope_tables
from test_rope_interpreted import DTYPES, LAYOUTS, guarded_call, oracle_of
from tolerance import assert_close, assert_same

from mistral_kernels.ops.rope import _rope_in_place_native, _rope_native

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
ARGUMENTS = ("q", "k", "cos", "sin", "positions", "interleaved", "q_scale")


def emulate(call: dict, interleaved: bool, *, in_place: bool = False, device: int = 0):
    """The turned q and k, or None in place."""
    native = _rope_in_place_native if in_place else _rope_native
    inputs = {**call, "interleaved": interleaved}
    return native(emulated_core().rope_cuda, *map(inputs.get, ARGUMENTS), device, 0)


def check(call: dict, interleaved: bool, turned) -> None:
    for name, got in zip("qk", turned, strict=True):
        exact, plain = oracle_of(call, name, interleaved)
        assert got.is_contiguous()
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
def test_in_place_gives_the_same_bits_and_writes_nothing_else(head_dim, dtype, interleaved):
    call = guarded_call(3, 2, head_dim, dtype)
    turned = emulate(call, interleaved)
    wide = call["q"]._base
    expected = wide.clone()
    expected[:, 1:-1, :head_dim] = torch.cat(turned, 1)
    emulate(call, interleaved, in_place=True)
    assert_same(wide, expected, "q, k and what lies beside them")


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


def test_under_address_and_undefined_behaviour_sanitizers():
    run_tests_sanitized(__file__)

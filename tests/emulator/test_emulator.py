"""The emulator itself: what works on a GPU works on it, and what does not is noticed."""

import sys
from pathlib import Path

import pytest
import torch
from emulator.host_build import EMULATOR, build, missing, run_sanitized
from emulator.orders import ORDERS, ordered
from emulator.selftest import Selftest

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = EMULATOR / "selftest.cu"
PRELUDE = """
import sys
from ctypes import byref, c_int
from emulator.selftest import Selftest
selftest, ints = Selftest(sys.argv[1]), (c_int * 32)(*range(32))
"""


@pytest.fixture(params=ORDERS)
def selftest(request):
    kernels = Selftest(build("selftest", SOURCE))
    with ordered(kernels.file, request.param):
        yield kernels


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_barriers_and_shuffles_add_up(selftest):
    numbers, sums = torch.arange(384.0), torch.empty(3)
    selftest.block_sum(numbers, sums, 3)
    assert sums.equal(numbers.view(3, 128).sum(1))


def test_dynamic_shared_memory_is_shared(selftest):
    numbers = torch.arange(70, dtype=torch.int32)
    selftest.reverse(numbers, 70, 0)
    assert numbers.tolist() == [*range(69, -1, -1)]


def test_every_block_finds_poison_in_shared_memory(selftest):
    found = ints(5, 2)
    selftest.fresh(found, 5)
    assert (found == -1).all()


def test_warp_operations(selftest):
    out = ints(3, 32)
    selftest.warp_operations(out)
    assert out[0].tolist() == [max(i - 1, 0) + 100 * min(i + 1, 31) for i in range(32)]
    assert (out[1] == -0x55555556).all()
    assert (out[2] == 1).all()


def test_a_copy_lands_when_its_group_is_waited_for(selftest):
    numbers, out = torch.arange(16, dtype=torch.int32), ints(16)
    selftest.async_all(numbers, out)
    assert out.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, *range(8, 16)]
    selftest.async_but_two(numbers, out)
    assert out.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, *[-1] * 8]


@pytest.mark.parametrize("name", ["multiply_bf16", "multiply_fp16"])
def test_tensor_core_layouts(selftest, name):
    a, b = (torch.randint(-9, 9, shape).float() for shape in ((16, 16), (16, 8)))
    product = torch.empty(16, 8)
    getattr(selftest, name)(a, b, product)
    assert product.equal(a @ b)


def test_only_one_order_has_several_blocks_alive(selftest, request):
    out, alive = ints(40, 2), ints(1)
    selftest.residents(out, alive, 40)
    assert out[:, 0].tolist() == [*range(40)], "each has its own shared memory"
    assert (int(out[:, 1].max()) > 0) == ("interleaved" in request.node.name)


def arrivals(order: str, seed: int = 0) -> list[int]:
    kernels, numbers = Selftest(build("selftest", SOURCE)), ints(4 * 70)
    with ordered(kernels.file, order, seed):
        kernels.arrivals(numbers, ints(1), 4, 70)
    return numbers.tolist()


def test_orders():
    assert arrivals("forward") == [*range(280)]
    assert arrivals("reverse") == [*range(279, -1, -1)]
    blocks = [number // 70 for number in arrivals("shuffled")]
    assert len([1 for a, b in zip(blocks, blocks[1:], strict=False) if a != b]) == 3
    found = [arrivals(order, seed) for order in ("shuffled", "interleaved") for seed in (0, 1)]
    assert all(sorted(numbers) == [*range(280)] for numbers in found)
    assert len({tuple(numbers) for numbers in found}) == 4
    assert arrivals("shuffled", 1) == found[1], "a seed means an order"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("divergent(ints)", "a barrier that not all threads reach"),
        ("absent_lane(ints)", "a lane outside the mask"),
        ("different_operations(ints)", "lanes of a warp at different operations"),
        ("misaligned_copy(ints)", "a misaligned address of cp.async"),
        ("too_many_threads(ints)", "cudaErrorInvalidConfiguration"),
        ("too_much_shared(ints)", "cudaErrorInvalidValue"),
        # By AddressSanitizer and UndefinedBehaviorSanitizer.
        ("reverse(ints, 32, 1)", "use-after-poison"),
        ("static_overrun(ints, 4)", "index 4 out of bounds"),
        ("static_overrun(byref(ints, 4), 3)", "buffer-overflow"),
        ("static_overrun(byref(ints, 1), 3)", "misaligned address"),
    ],
)
def test_notices(call, message):
    library = build("selftest", SOURCE, sanitize=True)
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", f"{PRELUDE}selftest.{call}", str(library)]
    # Small objects get red zones only where Python leaves them to malloc.
    result = run_sanitized(command, PYTHONPATH=tests, PYTHONMALLOC="malloc")
    assert result.returncode != 0
    assert message in result.stderr

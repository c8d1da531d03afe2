"""Runs a test of an op on every backend that can serve it here.

A test module names its op as `OP = "rms_norm"`; each of its tests that takes `backend` or `device`
runs once for every backend with a cell for that op that is available in this process: on CPU
tensors, and, marked `gpu`, on CUDA tensors. The `cpu` backend runs once for each instruction set
that the machine has. With TRITON_INTERPRET=1 the Triton cells run on the CPU; those tests are
marked `interpreter`. A test that takes `dtype` runs for each dtype served.

Where there is no GPU, the tests of the `triton` and `cuda` cells on CUDA tensors are collected and
skipped. What those cells return was filled with NaN before they ran.
"""

import os
from collections import Counter
from itertools import product
from typing import NamedTuple

import pytest
import torch
from emulator.orders import ORDERS, ordered

from mistral_kernels.ops import dispatch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.round_bf16_to_nearest()
    interpreter.multiply_as_a_gpu()
    interpreter.patch_the_language_once()
    interpreter.skip_overflow_checks()

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = ("triton", "cuda")  # backends that serve a GPU
GPU = torch.cuda.is_available()

# Files of few tests that take minutes: begun last, they would leave the other workers idle.
LONGEST = {"test_emulated_sanitized", "test_codegen", "test_install", "test_calibration"}

CORE = dispatch.native_extension()
INSTRUCTION_SETS = [] if isinstance(CORE, ImportError) else CORE.instruction_sets()


class Target(NamedTuple):
    """Where a test runs: a backend's name, the device of its tensors, and of `cpu` which code."""

    backend: str
    device: str
    instruction_set: str | None = None

    @property
    def name(self) -> str:
        return "-".join(filter(None, self))


def targets(op: str) -> list[Target]:
    """Return all places where `op` might run in this process."""
    found = []
    for backend, device in product(dispatch.backends(op), ("cpu", "cuda")):
        names = INSTRUCTION_SETS if backend == "cpu" and INSTRUCTION_SETS else [None]
        found += [Target(backend, device, name) for name in names]
    return found


def serves(op: str, target: Target, dtype: torch.dtype) -> bool:
    """Tell whether the target takes `op` on tensors of `dtype`, in this process or on a GPU."""
    cuda = target.device == "cuda"
    if cuda and not GPU:
        return target.backend in KERNELS and dtype in dispatch.OPS[op][target.backend].dtypes
    chosen = dispatch.prefer(
        op,
        device_type=target.device,
        capability=torch.cuda.get_device_capability() if cuda else None,
        dtype=dtype,
        backend=target.backend,
    )
    return chosen == target.backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    op, takes_dtype = metafunc.module.OP, "dtype" in metafunc.fixturenames
    cases = [
        pytest.param(
            *((target, dtype) if takes_dtype else (target,)),
            id=target.name + (f"-{dtype}".replace("torch.", "") if takes_dtype else ""),
            marks=marks(target),
        )
        for target in targets(op)
        for dtype in (DTYPES if takes_dtype else DTYPES[:1])
        if serves(op, target, dtype)
    ]
    names = ("target", "dtype") if takes_dtype else ("target",)
    metafunc.parametrize(names, cases, indirect=["target"])


def marks(target: Target) -> list[pytest.MarkDecorator]:
    """Return the marks by which a run picks or drops a target."""
    if target.device == "cuda":
        return [pytest.mark.gpu]
    return [pytest.mark.interpreter] if target.backend == "triton" else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {i for i in items if all(map(i.get_closest_marker, ("interpreter", "not_interpreted")))}
    items[:] = [item for item in items if item not in slow]
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONGEST, -counts[item.path]))
    for item in () if GPU else items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def use_instruction_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(dispatch, "instruction_set", lambda: INSTRUCTION_SETS.index(name))


@pytest.fixture
def poisoned_memory():
    """Fills new tensors with NaN and 2^31 - 1, so that what was not written is not read unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def target(request, monkeypatch) -> Target:
    if name := request.param.instruction_set:
        use_instruction_set(monkeypatch, name)
    if request.param.backend in KERNELS:
        request.getfixturevalue("poisoned_memory")
    return request.param


@pytest.fixture
def backend(target: Target) -> str:
    return target.backend


@pytest.fixture
def device(target: Target) -> str:
    return target.device


@pytest.fixture(params=INSTRUCTION_SETS)
def each_instruction_set(request, monkeypatch) -> None:
    """Runs a test of the C++ core once for each instruction set that the machine has."""
    use_instruction_set(monkeypatch, request.param)


@pytest.fixture(params=ORDERS)
def orders(request):
    """Runs a test of emulated kernels once for each order of blocks and threads."""
    from emulator.host_build import emulated_core  # wants pybind11, which tests alone need

    with ordered(emulated_core().__file__, request.param):
        yield request.param


@pytest.fixture
def threads():
    """Restores torch's number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> list[str]:
    reasons = ((name, dispatch.unavailable(name)) for name in dispatch.BACKENDS)
    return [f"backend {name}: {reason or 'available'}" for name, reason in reasons]

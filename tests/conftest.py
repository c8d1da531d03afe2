"""Runs a test of an op on every backend that can serve it here.

A test module names its op as `OP = "rms_norm"`; each of its tests that takes `backend` or `device`
runs once for every backend with a cell for that op that is available in this process: on CPU
tensors, and, marked `gpu`, on CUDA tensors where there is a GPU. With TRITON_INTERPRET=1 the Triton
cells run on the CPU; those tests are marked `interpreter`. A test that takes `dtype` runs for each
dtype served.
"""

import os
from itertools import product
from typing import NamedTuple

import pytest
import torch

from mistral_kernels.ops import dispatch

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import round_bf16_to_nearest

    round_bf16_to_nearest()

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Target(NamedTuple):
    """Where a test runs: a backend's name and the device of its tensors."""

    backend: str
    device: str


def serves(op: str, target: Target, dtype: torch.dtype) -> bool:
    """Tell whether the target takes `op` on tensors of `dtype` in this process."""
    cuda = target.device == "cuda"
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
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    cases = [
        pytest.param(
            *((target, dtype) if takes_dtype else (target,)),
            id="-".join((*target, *((str(dtype).removeprefix("torch."),) if takes_dtype else ()))),
            marks=marks(target),
        )
        for target in (Target(*pair) for pair in product(dispatch.backends(op), devices))
        for dtype in (DTYPES if takes_dtype else DTYPES[:1])
        if serves(op, target, dtype)
    ]
    metafunc.parametrize(("target", "dtype") if takes_dtype else ("target",), cases)


def marks(target: Target) -> list[pytest.MarkDecorator]:
    """Return the marks by which a run picks or drops a target."""
    if target.device == "cuda":
        return [pytest.mark.gpu]
    return [pytest.mark.interpreter] if target.backend == "triton" else []


@pytest.fixture
def backend(target: Target) -> str:
    return target.backend


@pytest.fixture
def device(target: Target) -> str:
    return target.device


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> list[str]:
    reasons = ((name, dispatch.unavailable(name)) for name in dispatch.BACKENDS)
    return [f"backend {name}: {reason or 'available'}" for name, reason in reasons]

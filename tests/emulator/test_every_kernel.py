"""No kernel is shipped that the emulator does not run."""

from pathlib import Path

import pytest
from emulator.host_build import CSRC
from emulator.kernels import declared_kernels

TESTS = Path(__file__).parent.parent
SOURCES = sorted(path for path in CSRC.rglob("*.cu") if "__global__" in path.read_text())


def test_headers_declare_no_kernel():
    # A kernel belongs to one op, whose test runs it.
    assert not [path for path in CSRC.rglob("*.*h") if "__global__" in path.read_text()]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_tests_of_an_op_run_its_kernels(source):
    assert declared_kernels(source)
    tests = TESTS / f"test_{source.stem}_emulated.py"
    assert tests.is_file(), f"{source.name} has kernels that no test runs"
    # That run fails where one of the declared kernels was not launched.
    assert "    run_tests_sanitized(__file__)" in tests.read_text().splitlines()

"""The comparison itself: what it counts as an error, and which limits it takes from the table."""

import pytest
import torch
from tolerance import assert_close, assert_same

from mistral_kernels import tolerance
from mistral_kernels.tolerance import Error, error


def test_error_counts_what_is_not_a_number():
    exact = torch.tensor([1.0, -torch.inf, 2.0], dtype=torch.float64)
    assert error(exact.float(), exact) == Error(0.0, 0.0)
    for wrong in (torch.nan, torch.inf):
        for place in range(3):
            out = exact.clone()
            out[place] = wrong
            assert not error(out, exact).within(Error(1e30, 1e30))
    with pytest.raises(ValueError, match="shape"):
        error(exact[:2], exact)


def test_error_of_nothing_is_zero():
    assert error(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)) == Error(0.0, 0.0)


def test_limits_of_the_table():
    for backend, largest in (("reference", 5e-5), ("cpu", 5e-5), ("triton", 1e-4), ("cuda", 1e-4)):
        assert tolerance.fp32_limit(backend) == Error(largest, largest)
    with pytest.raises(ValueError, match="'fast'"):
        tolerance.fp32_limit("fast")
    assert tolerance.low_precision_limit(Error(1.0, 0.5)) == Error(2.0 + 1e-5, 0.75)


@pytest.mark.parametrize(
    ("dtype", "found", "passes"),
    [
        # torch is off by 0.25 everywhere: 0.5 at most, 0.375 on average.
        (torch.bfloat16, [0.5, 0.25, 0.25, 0.25], True),
        (torch.bfloat16, [0.75, 0.0, 0.0, 0.0], False),
        (torch.bfloat16, [0.5, 0.5, 0.5, 0.5], False),
        (torch.float32, [0.5, 0.25, 0.25, 0.25], True),
        (torch.float32, [torch.nan, 0.0, 0.0, 0.0], False),
        (torch.float64, [1e-12, 0.0, 0.0, 0.0], True),
        (torch.float64, [1e-9, 0.0, 0.0, 0.0], False),
    ],
)
def test_a_result_is_judged_by_its_dtype(dtype, found, passes):
    exact = torch.zeros(4, dtype=torch.float64)
    peer = torch.full((4,), 0.25, dtype=dtype)
    if passes:
        assert_close(torch.tensor(found, dtype=dtype), peer, exact, "result")
    else:
        with pytest.raises(AssertionError, match="result: error"):
            assert_close(torch.tensor(found, dtype=dtype), peer, exact, "result")


def test_same_means_the_same_bits():
    nan = torch.tensor([torch.nan, 1.0])
    assert_same(nan, nan.clone(), "nan")
    for other in (torch.tensor([torch.nan, 2.0]), nan.double(), nan[:1]):
        with pytest.raises(AssertionError):
            assert_same(other, nan, "other")
    with pytest.raises(AssertionError, match="1 of 1 elements differ"):
        assert_same(torch.tensor([0.0]), torch.tensor([-0.0]), "zero")

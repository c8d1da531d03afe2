"""Bad input, one line a case: an op must refuse it and say op, argument, expected and got.

A case is (argument, bad value, expected, got), the last two being parts of the message. `cases`
makes those that follow from an argument's type alone; a test module adds the ones of its own op.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor


class Case(NamedTuple):
    """One bad argument and what the message must contain besides its name."""

    argument: str
    value: Any
    expected: str
    got: str


def case_id(case: Case) -> str:
    return f"{case[0]}-{case[3]}"


def cases(valid: dict[str, Any]) -> list[Case]:
    """Return the cases that the types of a valid call's arguments imply.

    Args:
        valid: name -> value of a call that works, `backend` left out; the first is a tensor.
    """
    found = [
        Case("backend", 3, "str", "int"),
        Case("backend", "fast", "reference", "'fast'"),
        # CPU tensors: no machine can serve this, whatever is installed.
        Case("backend", "cuda", "backend='auto'", "'cuda'"),
    ]
    for position, (argument, value) in enumerate(valid.items()):
        if isinstance(value, Tensor):
            found += [Case(argument, *rest) for rest in bad_tensors(value, first=position == 0)]
        elif isinstance(value, bool):
            found += [Case(argument, 1, "bool", "int")]
        elif isinstance(value, int):
            found += [Case(argument, 1.5, "int", "float"), Case(argument, True, "int", "bool")]
            found += [Case(argument, 0, ">= 1", "0")]
        elif isinstance(value, float):
            found += [
                Case(argument, "1", "float", "str"),
                Case(argument, math.inf, "finite", "inf"),
            ]
            found += [Case(argument, math.nan, "finite", "nan"), Case(argument, -1.0, "0", "-1.0")]
    return found


def bad_tensors(valid: Tensor, *, first: bool) -> list[tuple[Any, str, str]]:
    """Return (bad value, expected, got) for one tensor argument."""
    wrong_dtype = torch.complex64 if valid.is_floating_point() else torch.int64
    # Every second element of a twice as wide tensor: right shape, wrong stride.
    spread = torch.stack((valid, valid), -1).flatten(-2)[..., ::2]
    found = [
        ([1.0], "Tensor", "list"),
        (valid.to(wrong_dtype), str(valid.dtype), str(wrong_dtype)),
        (valid.new_zeros(()), "shape", "()"),
    ]
    if valid.shape[-1] > 1:
        found.append((spread, "contiguous", str(spread.stride())))
    if not first:
        found.append((valid.to("meta"), "cpu", "meta"))
    return found


def check(op: Callable, valid: dict[str, Any], case: Case) -> None:
    """Assert that `op` refuses `valid` with the case's argument in it, and says enough."""
    argument, value, expected, got = case
    with pytest.raises((TypeError, ValueError)) as caught:
        op(**{**valid, argument: value})
    message = str(caught.value)
    for part in (f"{op.__name__}:", argument, expected, got):
        assert part in message, f"{part!r} is not in {message!r}"


def check_refuses_grad(op: Callable, valid: dict[str, Any], argument: str) -> None:
    """Assert that `op` raises when `argument` requires grad, and runs when grad mode is off."""
    watched = {**valid, argument: valid[argument].clone().requires_grad_()}
    with pytest.raises(RuntimeError, match=rf"{op.__name__}: .*requires grad"):
        op(**watched)
    with torch.no_grad():
        op(**watched)

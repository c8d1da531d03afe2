"""Gradients of a differentiable op: against finite differences, plain torch, and torch.compile.

Each check takes a function of tensors by name that returns one tensor; an op with several outputs
is wrapped so that all of them count.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
from tolerance import assert_close, assert_same
from torch import Tensor
from whole_graph import whole_graph


def gradients(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    given: torch.dtype = torch.float32,
    needed: Iterable[str] | None = None,
) -> list[Tensor]:
    """Return the gradient of each input that is needed, for a fixed direction of the output.

    Inputs and direction have only the digits of `given`, so that a float64 run shares them.
    """
    values = {name: value.detach().to(given).to(dtype) for name, value in inputs.items()}
    leaves = [values[name].requires_grad_() for name in needed or inputs]
    out = function(**values)
    direction = torch.arange(out.numel(), device=out.device).cos().to(given).to(out.dtype)
    return torch.autograd.grad(out, leaves, direction.view_as(out))


def check(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> None:
    """Assert float64 gradients right by finite differences, float32 ones as good as autograd's."""
    doubles = [value.detach().double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *values: ours(**dict(zip(inputs, values, strict=True))), doubles
    )
    check_float32(ours, plain, inputs)
    # A second derivative would come out wrong in silence: it has to be refused.
    out = ours(**dict(zip(inputs, doubles, strict=True)))
    with pytest.raises(RuntimeError, match="_backward: .* requires grad"):
        torch.autograd.grad(out.sum(), doubles, create_graph=True)


def check_float32(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> None:
    """Assert that float32 gradients are about as near to float64 as those of plain autograd.

    Those of some inputs alone must be the same: what nobody asks for may not be worked out.
    """
    names = list(inputs)
    all_of_them = check_dtype(ours, plain, inputs, torch.float32)
    for some in (names[::2], names[1::2]) if len(names) > 1 else ():
        found = gradients(ours, inputs, torch.float32, needed=some)
        for name, gradient in zip(some, found, strict=True):
            assert_same(gradient, all_of_them[name], f"gradient of {name} beside frozen inputs")


def check_dtype(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Assert that gradients in `dtype` are about as near to float64 as those of plain autograd.

    Return the gradients by name.
    """
    found = gradients(ours, inputs, dtype, dtype)
    peers = gradients(plain, inputs, dtype, dtype)
    exact = gradients(plain, inputs, torch.float64, dtype)
    for name, got, peer, right in zip(inputs, found, peers, exact, strict=True):
        assert_close(got, peer, right, f"gradient of {name}")
    return dict(zip(inputs, found, strict=True))


def check_compiled(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    """Assert that one whole graph of torch.compile gives eager's output and gradients, bitwise."""
    compiled = whole_graph(function)
    assert_same(compiled(**inputs), function(**inputs), "compiled output")
    eager = gradients(function, inputs, torch.float32)
    for name, got, want in zip(
        inputs, gradients(compiled, inputs, torch.float32), eager, strict=True
    ):
        assert_same(got, want, f"compiled gradient of {name}")

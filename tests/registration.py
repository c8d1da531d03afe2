"""An op as torch knows it: schema, fake, autograd and tracing must tell the same story."""

from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops import dispatch


def check(name: str, *arguments: Any) -> None:
    """Run torch's opcheck on an op, and on its backward if an argument requires grad.

    Args:
        name: the op's registered name.
        arguments: all arguments of its schema, `backend` last.
    """
    op = getattr(torch.ops.mistral_kernels, name).default
    torch.library.opcheck(op, arguments)
    watched = any(isinstance(value, Tensor) and value.requires_grad for value in arguments)
    if not watched:
        return
    assert f"{name}_backward" in dispatch.OPS
    plain = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
    outputs = op(*plain)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(out) for out in outputs if out.is_floating_point()]
    backward = getattr(torch.ops.mistral_kernels, f"{name}_backward").default
    count = sum(isinstance(value, Tensor) and value.requires_grad for value in arguments)
    needs = [False] * (count - 1) + [True]  # the op's own check asks for all gradients
    torch.library.opcheck(backward, (grads, needs, *plain))

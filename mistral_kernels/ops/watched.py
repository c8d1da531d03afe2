"""Whether a call of an op must pass torch's dispatcher, or may go to the kernel itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def watched(x: Tensor) -> bool:
    """Whether a call with x must pass torch's dispatcher: for a gradient, for somebody who traces,
    profiles or intercepts, or because x is more than its memory."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
        or type(x) is not Tensor
    )


def any_watched(inputs: Sequence) -> bool:
    """As `watched`, for callers who may do anything with any argument: the users of an op.

    Transforms as torch.vmap hand over tensors without memory, and of a view as conj().imag has it
    the memory holds -x.
    """
    return (
        watched(inputs[0])
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or any(isinstance(value, Tensor) and not _is_its_memory(value) for value in inputs)
    )


def _is_its_memory(x: Tensor) -> bool:
    return type(x) in (Tensor, Parameter) and not x.is_neg() and not x.is_meta

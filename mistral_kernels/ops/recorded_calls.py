"""Calls of the compiled core, recorded once and made again on the same memory: a graph for the CPU.

What Python does around a kernel (checks, shapes, new tensors) costs more than a small kernel
itself, and a decode step does the same every time: the same calls, of the same sizes, at the same
addresses. So it is run once while its calls are written down, and from then on only they are made.

    step = RecordedCalls(lambda: model_of(static_inputs))
    static_inputs.copy_(...); step.replay(); step.result

The function may do nothing on the data but through the core: views and new tensors are allowed,
anything else that torch is asked for would not be done again, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mistral_kernels.ops import dispatch

# What a function may ask of tensors: where they lie and how, and new memory. Those that return a
# tensor return a view, or are refused.
FACTS = {
    *("data_ptr", "dim", "element_size", "is_contiguous", "numel", "size", "stride", "__len__"),
    "__get__",  # of a property, as shape, dtype and device
}
VIEWS = {"__getitem__", "flatten", "reshape", "split", "transpose", "unflatten", "view"}
NEW = {"new_empty"}


class NotRecordableError(RuntimeError):
    """A function does something that a recording would leave out; the text names it."""


class RecordedCalls:
    """Calls `function` once, and keeps its calls of the core to make them again.

    Args:
        function: takes nothing; uses torch for views and new tensors alone.

    Attributes:
        result: what the function returned; `replay` writes it anew.
        calls: how many were recorded.

    Raises:
        NotRecordableError: it asked torch for something else; it may have been run in part.
    """

    def __init__(self, function: Callable[[], Any]):
        core = _Recorder(dispatch.native_extension())
        with _Watch() as watch, dispatch.native_extension_as(core):
            self.result = function()
        self._calls = core.calls
        self.calls = len(core.calls)
        self._tensors = watch.tensors  # the calls hold addresses: the memory has to stay

    def replay(self) -> None:
        """Makes the calls again, on what the same memory holds now."""
        for call, arguments in self._calls:
            call(*arguments)


class _Recorder:
    """Stands for the core and writes down what is called."""

    def __init__(self, core):
        self._core = core
        self.calls: list[tuple[Callable, tuple]] = []

    def __getattr__(self, name: str):
        function = getattr(self._core, name)

        def call(*arguments):
            self.calls.append((function, arguments))
            return function(*arguments)

        return call


class _Watch(TorchFunctionMode):
    """Keeps every tensor that comes up, and refuses what computes."""

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name not in FACTS | VIEWS | NEW:
            raise NotRecordableError(f"{name} is not a call of the compiled core")
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.tensors.append(tensor)
                if name in VIEWS and not _shares_memory(tensor, args[0]):
                    raise NotRecordableError(f"{name} makes a copy here, which is no view")
        return result


def _shares_memory(x: Tensor, y: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()

"""Calls of the compiled core, recorded once and made again on the same memory: a graph for the CPU.

What Python does around a kernel (checks, shapes, new tensors) costs more than a small kernel
itself, and a decode step does the same every time: the same calls, of the same sizes, at the same
addresses. So it is run once while its calls are written down, and from then on only they are made.

    step = RecordedCalls(lambda: model_of(static_inputs))
    static_inputs.copy_(...); step.replay(); step.result

Of torch the function may want views, new tensors, and what writes into a tensor that is there
(`add_`, `out=`), which is recorded too. Anything else would not be done again, and is refused.
Numbers and sizes stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
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
    """Calls `function` once, and keeps what it called to call it again.

    Args:
        function: takes nothing; uses torch for views, new tensors and writing alone.

    Attributes:
        result: what the function returned; `replay` writes it anew.
        calls: what was recorded, of the core or of torch.

    Raises:
        NotRecordableError: it asked torch for something else; it may have been run in part. Or
            there is no compiled core.
    """

    def __init__(self, function: Callable[[], Any]):
        if reason := dispatch.unavailable("cpu"):
            raise NotRecordableError(reason)
        self.calls: list[Any] = []
        self._threads = torch.get_num_threads()
        core = _Recorder(dispatch.native_extension(), self.calls)
        with _Watch(self.calls) as watch, dispatch.native_extension_as(core):
            self.result = function()
        self._tensors = watch.tensors  # the calls hold addresses: the memory has to stay
        self._runs = [*_joined(self.calls)]

    def current(self) -> bool:
        """Whether new calls would be the same: each says on how many threads it runs."""
        return torch.get_num_threads() == self._threads

    def replay(self) -> None:
        """Makes the calls again, on what the same memory holds now."""
        for run in self._runs:
            run()


def _joined(calls: list[Any]) -> Iterator[Callable[[], Any]]:
    """What makes all calls; those of the core that follow each other are made without Python."""
    core = dispatch.native_extension()
    for kind, group in groupby(calls, type):
        if kind is core.Call:
            yield core.Calls([*group]).make
        else:
            yield from group


class _Recorder:
    """Stands for the core and writes down what is called."""

    def __init__(self, core, calls: list[Any]):
        self._core, self._calls = core, calls

    def __getattr__(self, name: str):
        function = getattr(self._core, name)
        later = getattr(self._core.later, name, None)
        if later is None:  # asks for facts; CUDA's kernels are captured in graphs instead
            return function

        def call(*arguments):
            self._calls.append(later(*arguments))
            return function(*arguments)

        return call


class _Watch(TorchFunctionMode):
    """Keeps the memory that calls use, writes down what torch writes, refuses the rest."""

    def __init__(self, calls: list[Any]):
        super().__init__()
        self._calls = calls
        self.tensors: list[Tensor] = []  # those whose address anybody asked for

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        result = func(*args, **kwargs)
        if kwargs.get("out") is not None or (name.endswith("_") and not name.endswith("__")):
            self._calls.append(partial(func, *args, **kwargs))
        elif name not in FACTS | VIEWS | NEW:
            raise NotRecordableError(f"{name} is not a call of the compiled core")
        if name == "data_ptr":
            self.tensors.append(args[0])
        elif name in VIEWS:
            parts = result if isinstance(result, tuple) else (result,)
            if not all(_shares_memory(part, args[0]) for part in parts):
                raise NotRecordableError(f"{name} makes a copy here, which is no view")
        return result


def _shares_memory(x: Tensor, y: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()

"""Which torch ops a cell runs: a compiled one should only allocate its outputs and make views."""

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = ("aten::empty", "aten::new_empty")


class _Recorder(TorchDispatchMode):
    """Collects the names of the ops that run under it."""

    def __init__(self):
        super().__init__()
        self.computing: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.name().startswith(ALLOCATIONS):
            self.computing.append(func.name())
        return func(*args, **(kwargs or {}))


def torch_ops_of(run: Callable, *inputs) -> list[str]:
    """Runs a cell and returns the aten ops it called that are neither allocation nor view."""
    with _Recorder() as recorder:
        run(*inputs)
    return recorder.computing

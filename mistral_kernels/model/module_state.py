"""Whether a module still is what it was when its calls were recorded."""

from __future__ import annotations

from torch import Tensor, nn


class ModuleState:
    """What of a module and all in it decides which kernels a call of it runs, on which memory.

    Comparing costs about a microsecond a module: hooks, forwards put in its place, parameters,
    buffers and parts exchanged, moved, seen otherwise, added or taken away, and training mode.
    Hooks on the module itself run around its call, whatever is done in it, and do not count.
    """

    def __init__(self, module: nn.Module):
        self._modules = [part.__dict__ for part in module.modules()]
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        self._hooks = [own[name] for own in self._modules[1:] for name in hooks]
        tensors = ("_parameters", "_buffers")
        self._tensors = [own[name] for own in self._modules for name in tensors if own[name]]
        self._parts = [own["_modules"] for own in self._modules]
        # What was recorded while somebody listened may hold what he did.
        self._state = None if any(self._hooks) else self._look()

    def _look(self) -> tuple[list, ...]:
        return (
            [(own.get("forward"), own["training"]) for own in self._modules],
            [part for parts in self._parts for part in parts.values()],
            [_memory(x) for named in self._tensors for x in named.values()],
        )

    def unchanged(self) -> bool:
        """Tells whether nothing has changed, and nobody listens."""
        return not any(self._hooks) and self._look() == self._state


def _memory(x: Tensor | None) -> tuple | None:
    """Where a tensor lies and how: through `data` a transposed one may take its place."""
    return None if x is None else (x.data_ptr(), x.dtype, x.shape, x.stride())

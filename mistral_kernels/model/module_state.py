"""Whether a module still is what it was when its calls were recorded."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mistral_kernels.ops.dispatch import BoundOp

if TYPE_CHECKING:
    from mistral_kernels.model.transformer import Transformer

# Where code is from that a replay may leave out: a part's own, and torch's in a container.
OURS = ("mistral_kernels.", nn.Module.__module__.rpartition(".")[0])
# What every module has to itself; hooks, tensors and parts are looked at on their own.
BOOKKEEPING = nn.Module().__dict__.keys() - {"training"}


class ModuleState:
    """What of a module and all in it decides which kernels a call of it runs, on which memory.

    Comparing costs about two microseconds a module: hooks, forwards put in its place or in its
    class's, compiled calls, numbers and other attributes, parameters, buffers and parts exchanged,
    moved, seen otherwise, added or taken away, and training mode. Hooks on the module itself run
    around its call, whatever is done in it, and do not count; those on all modules do.
    """

    def __init__(self, module: nn.Module):
        parts = [*module.modules()]
        owned = [part.__dict__ for part in parts]
        names = [[name for name in own if name not in BOOKKEEPING] for own in owned]
        self._modules = [*zip(parts, owned, names, strict=True)]
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        self._hooks = [own[name] for own in owned[1:] for name in hooks]
        tensors = ("_parameters", "_buffers")
        self._tensors = [own[name] for own in owned for name in tensors if own[name]]
        self._parts = [own["_modules"] for own in owned]
        # What was recorded while somebody listened may hold what he did.
        self._state = None if self._somebody_listens() else self._look()

    def _somebody_listens(self) -> bool:
        return any(self._hooks) or bool(torch_module._has_any_global_hook())

    def _look(self) -> tuple[list, list]:
        """What is compared by identity, and what is by value."""
        own, memory = [], []
        for part, held, names in self._modules:
            own += (type(part).forward, len(held), *map(held.get, names))
        for parts in self._parts:
            own += parts.values()
        for named in self._tensors:
            memory += map(_memory, named.values())
        return own, memory

    def unchanged(self) -> bool:
        """Tells whether nothing has changed, and nobody listens."""
        if self._state is None or self._somebody_listens():
            return False
        (own, memory), (before, memory_before) = self._look(), self._state
        same = len(own) == len(before) and all(map(is_, own, before))
        return same and memory == memory_before


def others_take_part(model: Transformer) -> bool:
    """Whether code that is not ours runs between a step's calls, which a replay would leave out.

    Hooks, parts and forwards of the caller's, compiled ones too, and what stands for an op.
    """
    return (
        not ModuleState(model).unchanged()
        or not all(_is_ours(part) for layer in model.layers for part in layer.modules())
        or any(type(op) is not BoundOp for op in model.kernels.values())
    )


def _is_ours(part: nn.Module) -> bool:
    kind = type(part)
    code = getattr(kind.forward, "__globals__", {})
    homes = kind.__module__, code.get("__name__", "")
    own = {"forward", "_compiled_call_impl"} & part.__dict__.keys()
    return not own and all(home.startswith(OURS) for home in homes)


def _memory(x: Tensor | None) -> tuple | None:
    """Where a tensor lies and how: through `data` a transposed one may take its place."""
    return None if x is None else (x.data_ptr(), x.dtype, x.shape, x.stride())

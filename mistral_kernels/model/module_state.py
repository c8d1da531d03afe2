"""Whether a module still is what it was when its calls were recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mistral_kernels.ops.dispatch import BoundOp

if TYPE_CHECKING:
    from mistral_kernels.model.transformer import Transformer

# Where code is from that a replay may leave out: a part's own, and torch's in a container.
OURS = ("mistral_kernels.", nn.Module.__module__.rpartition(".")[0])


class ModuleState:
    """What of a module and all in it decides which kernels a call of it runs, on which memory.

    Comparing costs about a microsecond a module: hooks, forwards put in its place or in its
    class's, compiled calls, parameters, buffers and parts exchanged, moved, seen otherwise, added
    or taken away, and training mode. Hooks on the module itself run around its call, whatever is
    done in it, and do not count; those on all modules of the process do.
    """

    def __init__(self, module: nn.Module):
        self._modules = [(part, part.__dict__) for part in module.modules()]
        owned = [own for _, own in self._modules]
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        self._hooks = [own[name] for own in owned[1:] for name in hooks]
        tensors = ("_parameters", "_buffers")
        self._tensors = [own[name] for own in owned for name in tensors if own[name]]
        self._parts = [own["_modules"] for own in owned]
        # What was recorded while somebody listened may hold what he did.
        self._state = None if self._somebody_listens() else self._look()

    def _somebody_listens(self) -> bool:
        return any(self._hooks) or bool(torch_module._has_any_global_hook())

    def _look(self) -> tuple[list, ...]:
        return (
            [
                (
                    type(part).forward,
                    own.get("forward"),
                    own.get("_compiled_call_impl"),
                    own.get("training"),
                )
                for part, own in self._modules
            ],
            [part for parts in self._parts for part in parts.values()],
            [_memory(x) for named in self._tensors for x in named.values()],
        )

    def unchanged(self) -> bool:
        """Tells whether nothing has changed, and nobody listens."""
        return not self._somebody_listens() and self._look() == self._state


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

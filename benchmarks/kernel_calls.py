"""The calls that benchmarks time, for those who time them in another way."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

# Files of kernels that are steps of other ops.
STEPS = ("plan", "combine", "rows_backward", "matrix_backward")
STEPS_OF = {f"expert_{step}": ("expert_mlp",) for step in STEPS}
STEPS_OF |= dict.fromkeys(("expert_up", "expert_down"), ("expert_mlp", "expert_mlp_low_bit"))
STEPS_OF |= {"attention_combine": ("prefill_attention",)}
Call = tuple[Callable[..., Tensor], tuple]


def bench_calls(stem: str, sizes: str, device: str) -> Iterator[tuple[str, Callable[[], Call]]]:
    """What benchmarks time of the ops that a file of kernels serves; for a backward, gradients.

    Args:
        stem: of the file.
        sizes: key of the benchmarks' SHAPES.
        device: for the inputs.

    Yields:
        A case's name, and what makes its call and the bf16 inputs of that.
    """
    gradients = stem.endswith("_backward")
    for op in STEPS_OF.get(stem, (stem.removesuffix("_backward"),)):
        module = importlib.import_module(f"benchmarks.bench_{op}")
        for case, shape in module.SHAPES[sizes].items():
            yield case, partial(bench_call, module, shape, device, gradients)


def bench_call(module: ModuleType, shape: tuple, device: str, gradients: bool) -> Call:
    """The call of one benchmark for one shape."""
    (test,) = (run for name, run in vars(module).items() if name.startswith("test_"))
    found = []

    def bench(call, make_inputs, work, peers, **how) -> dict:
        found.append((call, make_inputs()))
        return {}

    test(bench, {}, device, shape, torch.bfloat16, "triton")
    ((call, inputs),) = found
    return (with_gradients(call) if gradients else call), inputs


def with_gradients(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call` and its backward: all gradients in one tensor."""

    def run(*inputs) -> Tensor:
        inputs = [x.detach().requires_grad_() if is_float(x) else x for x in inputs]
        out, leaves = call(*inputs), [x for x in inputs if is_float(x)]
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return torch.cat([gradient.flatten() for gradient in gradients])

    return run


def is_float(x: object) -> bool:
    """Whether x is a tensor of numbers that may have another dtype; to torch FP8 codes float."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize > 1

"""The calls that benchmarks time, for those who time them in another way."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

# Files of kernels that are steps of another op.
STEPS = ("plan", "up", "down", "combine", "rows_backward", "matrix_backward")
STEPS_OF = {f"expert_{step}": "expert_mlp" for step in STEPS}
STEPS_OF |= {"attention_combine": "prefill_attention"}


def bench_module(stem: str) -> ModuleType:
    """The benchmark of the op that a file of kernels serves."""
    op = STEPS_OF.get(stem, stem).removesuffix("_backward")
    return importlib.import_module(f"benchmarks.bench_{op}")


def bench_call(stem: str, shape: tuple, device: str) -> tuple[Callable[..., Tensor], tuple]:
    """What that benchmark times for a shape, and its bf16 inputs; for a backward, gradients."""
    (test,) = (run for name, run in vars(bench_module(stem)).items() if name.startswith("test_"))
    found = []

    def bench(call, make_inputs, work, peers, **how) -> dict:
        found.append((call, make_inputs()))
        return {}

    test(bench, {}, device, shape, torch.bfloat16, "triton")
    ((call, inputs),) = found
    return (with_gradients(call) if stem.endswith("_backward") else call), inputs


def with_gradients(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call` and its backward: all gradients in one tensor."""

    def run(*inputs) -> Tensor:
        inputs = [x.detach().requires_grad_() if is_float(x) else x for x in inputs]
        out, leaves = call(*inputs), [x for x in inputs if is_float(x)]
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return torch.cat([gradient.flatten() for gradient in gradients])

    return run


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()

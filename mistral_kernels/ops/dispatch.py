"""Registers the ops with torch and chooses who serves a call: the whole policy in one place.

An op is one row: a schema, a fake, a `reference` cell, and whatever `cpu`, `triton` and `cuda`
cells exist. `define` registers the row as `torch.ops.mistral_kernels.<name>`; `choose` is the pure
function that picks the cell. Nothing falls back silently: a backend asked for by name that cannot
serve is an error, and `auto` takes the first of `AUTO_ORDER` that can and should (`Cell.auto`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_kernels.ops.watched import any_watched, watched

BACKENDS = ("reference", "cpu", "triton", "cuda")
OR_AUTO = " or auto"  # behind a backend's name: a preference
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# What kernels take; csrc/dtype.h numbers them in this order.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR_BYTES = 16  # rows that CUDA kernels read begin and end on multiples of that, or are refused

Facts = tuple[tuple[str, int], ...]


class Cell(NamedTuple):
    """One implementation of one op, and what it can serve.

    `run` takes the op's arguments without `backend`. `refuses(facts)` returns why small numbers
    such as head_dim or page_size are out of its reach, or None. `auto(facts)` tells whether
    backend "auto" takes it where it can serve: False where no measurement speaks for it.
    `asks_each_call`: what it refuses differs from call to call of a model, such as the number of
    tokens. `waits`: its host reads what the device has computed, so no CUDA graph can hold it.
    """

    run: Callable
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    min_capability: tuple[int, int] = (8, 0)
    refuses: Callable[[dict[str, int]], str | None] = lambda facts: None
    auto: Callable[[dict[str, int]], bool] = lambda facts: True
    asks_each_call: bool = False
    waits: bool = False


OPS: dict[str, dict[str, Cell]] = {}
_runs: dict[str, Callable] = {}  # what the dispatcher calls: the op's arguments, then `backend`
_library = torch.library.Library("mistral_kernels", "DEF")


_core_instead: ContextVar[Any] = ContextVar("_core_instead", default=None)


def native_extension():
    """The compiled core `mistral_kernels._C`, or the ImportError that says why there is none."""
    return _core_instead.get() or _load_core()


@functools.cache
def _load_core():
    try:
        from mistral_kernels import _C
    except ImportError as error:
        return error
    return _C


@contextlib.contextmanager
def native_extension_as(core: Any) -> Iterator[None]:
    """Within it, in this thread, `core` stands for the compiled core."""
    token = _core_instead.set(core)
    try:
        yield
    finally:
        _core_instead.reset(token)


@functools.cache
def instruction_set() -> int:
    """The widest instruction set that the machine has, as an index of `_C.instruction_sets()`."""
    return len(native_extension().instruction_sets()) - 1


def cpu_queue() -> tuple[int, int]:
    """How the C++ core is to run: threads of torch's pool, and the instruction set."""
    return torch.get_num_threads(), instruction_set()


def cuda_queue(device: torch.device) -> tuple[int, int]:
    """How the CUDA core is to run: the device, and torch's current stream on it."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def address(x: Tensor | None) -> int:
    """Where x begins; 0 for no tensor, as C++ expects it."""
    return 0 if x is None else x.data_ptr()


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run in this process, or None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "no CUDA device, and TRITON_INTERPRET is not 1"
    core = native_extension()
    if isinstance(core, ImportError):
        return f"the compiled core did not load ({core})"
    if backend == "cpu":
        return None
    if core.build_info()["cuda"] is None:
        return "this build has no CUDA code (no nvcc was found when it was installed)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    driver, runtime = core.cuda_versions()
    if driver < runtime:
        return f"the CUDA driver ({driver}) is older than the runtime this build uses ({runtime})"
    return None


def backends(op: str) -> tuple[str, ...]:
    """The backends that have a cell for `op`, whether or not they can run in this process."""
    return tuple(name for name in BACKENDS if name in OPS[op])


def _refusal(
    op: str,
    backend: str,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    facts: Facts,
) -> str | None:
    """Why `backend` cannot serve this call of `op`, or None if it can."""
    if backend not in OPS[op]:
        return f"{op} has no {backend} implementation, only {', '.join(backends(op))}"
    if reason := unavailable(backend):
        return reason
    cell = OPS[op][backend]
    if backend == "cpu" and device_type != "cpu":
        return f"it serves CPU tensors, got {device_type}"
    if backend == "cuda" and device_type != "cuda":
        return f"it serves CUDA tensors, got {device_type}"
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it serves CUDA tensors (CPU tensors only under TRITON_INTERPRET=1)"
    if backend != "reference":
        if dtype not in cell.dtypes:
            return f"it serves {', '.join(map(str, cell.dtypes))}, got {dtype}"
        if capability is not None and capability < cell.min_capability:
            return f"it needs compute capability {cell.min_capability}, got {capability}"
    return cell.refuses(dict(facts))


@functools.lru_cache(maxsize=4096)
def choose(
    op: str,
    *,
    device_type: str,
    capability: tuple[int, int] | None = None,
    dtype: torch.dtype,
    facts: Facts = (),
    backend: str = "auto",
) -> str:
    """The backend that serves a call of `op`.

    Args:
        op: name of a registered op.
        device_type: "cpu" or "cuda", where the tensors are.
        capability: compute capability of the GPU, None on the CPU.
        dtype: dtype of the op's first tensor.
        facts: small numbers that decide, such as (("head_dim", 128), ("page_size", 16)).
        backend: one of BACKENDS, or "auto"; "cuda or auto" prefers cuda where it can serve.

    Raises:
        ValueError: no such op or backend, or the named one cannot serve; says why and what to do.
    """
    if op not in OPS:
        raise ValueError(f"choose: op must be one of {', '.join(OPS)}, got {op!r}")
    if backend != "auto":
        named = backend.removesuffix(OR_AUTO)
        if named not in BACKENDS:
            raise ValueError(f"{op}: backend must be 'auto' or one of {BACKENDS}, got {named!r}")
        reason = _refusal(op, named, device_type, capability, dtype, facts)
        if reason is None:
            return named
        if named == backend:
            raise ValueError(
                f"{op}: backend {backend!r} cannot serve this call: {reason}. Use backend='auto'."
            )
    for name in AUTO_ORDER.get(device_type, ("reference",)):
        refused = _refusal(op, name, device_type, capability, dtype, facts)
        if refused is None and OPS[op][name].auto(dict(facts)):
            return name
    return "reference"


def prefer(op: str, *, backend: str, **call) -> str:
    """As `choose`, but a named backend is a preference: where it cannot serve, `auto` decides."""
    if backend != "auto":
        backend = f"{backend}".removesuffix(OR_AUTO) + OR_AUTO
    return choose(op, backend=backend, **call)


class BoundOp:
    """An op for a caller whose arguments are known to fit: a model.

    It takes the arguments of the schema without `backend`, and checks none of them. It calls the
    cell itself where torch's dispatcher would only add to the microseconds, unless `watched`; `run`
    is the cell, for who has asked that already. Where the chosen cell `asks_each_call`, each call
    chooses anew and prefers it; with backend "auto" each call chooses.
    """

    def __init__(self, name: str, backend: str):
        self.name, self.backend = name, backend
        run = _runs[name]
        asks = backend != "auto" and OPS[name][backend].asks_each_call
        self._choice = choice = backend + OR_AUTO if asks else backend
        chosen = backend != "auto" and not asks
        self.run = OPS[name][backend].run if chosen else lambda *inputs: run(*inputs, choice)
        self._op = getattr(torch.ops.mistral_kernels, name).default

    def __call__(self, *inputs):
        if watched(inputs[0]):
            return self._op(*inputs, self._choice)
        return self.run(*inputs)

    def __reduce__(self):  # a model can be pickled though its cells cannot
        return BoundOp, (self.name, self.backend)


@functools.cache
def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def _call_facts(device: torch.device, dtype: torch.dtype) -> dict:
    """What `choose` wants to know of an op's first tensor. Cached: a call of an op is a few us."""
    return {
        "device_type": device.type,
        "capability": device_capability(device),
        "dtype": dtype,
    }


def define(
    name: str,
    arguments: str,
    returns: str,
    *,
    fake: Callable,
    cells: dict[str, Cell | Callable],
    facts: Callable[..., Facts] = lambda *inputs: (),
    check_values: Callable[..., None] | None = None,
    differentiable: Sequence[str] = (),
    backward: Callable | dict[str, Cell | Callable] | None = None,
) -> Callable:
    """Registers one op and returns a function that takes all its arguments and `backend`.

    Args:
        name: the op's name; it becomes `torch.ops.mistral_kernels.<name>`.
        arguments, returns: halves of the schema, without `backend`; the first argument is a tensor
            whose device and dtype choose the backend. No defaults: the public function holds them.
        fake: takes the arguments, returns empty outputs of the right shape and dtype.
        cells: backend -> implementation.
        facts: takes the arguments, returns what `Cell.refuses` wants to know.
        check_values: takes the arguments; checks the contents of small tensors. It runs on CPU
            tensors only, because on a GPU it would wait for the device.
        differentiable: names of the arguments that get a gradient. Empty: the op refuses autograd.
        backward: `(grads, needs, *arguments) -> gradients` in the order of `differentiable`, where
            `grads` belong to the floating-point outputs and `needs` are as many bools: a gradient
            that is not needed may be None. The reference, or cells by backend as above. It becomes
            the op `<name>_backward`, which asks the same `facts`.
    """
    _library.define(f"{name}({arguments}, str backend) -> {returns}")
    OPS[name] = row = _row(cells)
    op = getattr(torch.ops.mistral_kernels, name).default

    def run(*inputs_and_backend):
        inputs, backend = inputs_and_backend[:-1], inputs_and_backend[-1]
        first = inputs[0]
        call = _call_facts(first.device, first.dtype)
        if check_values is not None and call["device_type"] == "cpu":
            check_values(*inputs)
        return row[choose(name, facts=facts(*inputs), backend=backend, **call)].run(*inputs)

    _runs[name] = run
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(op, lambda *inputs: fake(*inputs[:-1]), lib=_library)
    if backward is None:
        _library.impl(name, functools.partial(_refuse_autograd, op), "Autograd", with_keyset=True)
    else:
        backward_row = _row(backward if isinstance(backward, dict) else {"reference": backward})
        _define_backward(name, arguments, differentiable, backward_row, facts)

    def call(*inputs):
        # Past torch's dispatcher, which takes 8 us of a call (Xeon at 2.5 GHz), where it can.
        return (op if any_watched(inputs) else run)(*inputs)

    return call


def _row(cells: dict[str, Cell | Callable]) -> dict[str, Cell]:
    return {key: cell if isinstance(cell, Cell) else Cell(cell) for key, cell in cells.items()}


def _no_gradient(op: str, argument: str) -> RuntimeError:
    return RuntimeError(
        f"{op}: {argument} requires grad, but this op has no backward for it; call it under"
        " torch.no_grad() or pass a detached tensor"
    )


def _refuse_autograd(op, keyset, *inputs):
    """Kernels write through raw pointers, unseen by autograd: refuse rather than be wrong."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        for argument, value in zip(op._schema.arguments, inputs, strict=True):
            # _backward ops take lists of tensors.
            tensors = value if isinstance(value, (list, tuple)) else (value,)
            if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
                raise _no_gradient(op._schema.name.split("::")[1], argument.name)
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _define_backward(
    name: str,
    arguments: str,
    differentiable: Sequence[str],
    row: dict[str, Cell],
    facts: Callable[..., Facts],
) -> None:
    """Registers `<name>_backward`, an op of its own so that it stays opaque to torch.compile."""
    names = [argument.split()[-1] for argument in arguments.split(",")]
    wanted = [names.index(argument) for argument in differentiable]
    backward_name = f"{name}_backward"
    schema = f"(Tensor[] grads, bool[] needs, {arguments}, str backend) -> Tensor[]"
    _library.define(backward_name + schema)
    OPS[backward_name] = row
    backward_op = getattr(torch.ops.mistral_kernels, backward_name).default

    def run(grads, needs, *inputs_and_backend):
        *inputs, backend = inputs_and_backend
        # The forward's backend is a preference here: a cell may lack its backward.
        call = _call_facts(inputs[0].device, inputs[0].dtype)
        chosen = prefer(backward_name, facts=facts(*inputs), backend=backend, **call)
        found = zip(row[chosen].run(grads, needs, *inputs), needs, wanted, strict=True)
        return [g.to(inputs[i].dtype).contiguous() for g, needed, i in found if needed]

    def fake(grads, needs, *inputs):
        found = zip(needs, wanted, strict=True)
        return [inputs[i].new_empty(inputs[i].shape) for needed, i in found if needed]

    for key in ("CPU", "CUDA"):
        _library.impl(backward_name, run, key)
    torch.library.register_fake(backward_op, fake, lib=_library)
    refuse = functools.partial(_refuse_autograd, backward_op)
    _library.impl(backward_name, refuse, "Autograd", with_keyset=True)

    def setup_context(ctx, inputs, output):
        for i, value in enumerate(inputs):
            if isinstance(value, Tensor) and value.requires_grad and i not in wanted:
                raise _no_gradient(name, names[i])
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.floating = [tensor.is_floating_point() for tensor in outputs]
        ctx.tensors = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [value for value in inputs if not isinstance(value, Tensor)]

    def differentiate(ctx, *grads):
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(tensors if is_tensor else others) for is_tensor in ctx.tensors]
        grads = [grad for grad, floating in zip(grads, ctx.floating, strict=True) if floating]
        needs = [ctx.needs_input_grad[i] for i in wanted]  # of a frozen weight it is not
        gradients = iter(backward_op(grads, needs, *inputs))
        needed = {i for i, needed in zip(wanted, needs, strict=True) if needed}
        return tuple(next(gradients) if i in needed else None for i in range(len(inputs)))

    torch.library.register_autograd(
        f"mistral_kernels::{name}", differentiate, setup_context=setup_context, lib=_library
    )

"""Who serves a call: the policy of `ops.dispatch`, as a pure function, and its errors."""

import functools
import inspect
import os
import subprocess
import sys

import pytest
import torch

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

CPU = {"device_type": "cpu", "capability": None, "dtype": torch.float32}
H100 = {"device_type": "cuda", "capability": (9, 0), "dtype": torch.bfloat16}
FULL_ROWS = ("rms_norm", "add_rms_norm", "rope", "rope_", "store_kv_", "route_experts", "silu_mul")


@pytest.fixture
def installed(monkeypatch):
    """Make a set of backends available, whatever this machine has, and forget earlier choices."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def install(*names: str) -> None:
        def unavailable(backend: str) -> str | None:
            return None if backend in ("reference", *names) else f"no {backend} here"

        dispatch.choose.cache_clear()
        monkeypatch.setattr(dispatch, "unavailable", unavailable)

    yield install
    monkeypatch.undo()
    dispatch.choose.cache_clear()


@pytest.mark.parametrize(
    ("call", "available", "expected"),
    [
        (CPU, (), "reference"),
        (CPU, ("cpu",), "cpu"),
        (CPU, ("cpu", "triton", "cuda"), "cpu"),
        (H100, (), "reference"),
        (H100, ("triton",), "triton"),
        (H100, ("triton", "cuda"), "cuda"),
        (H100, ("cpu",), "reference"),
        ({**H100, "capability": (7, 5)}, ("triton", "cuda"), "reference"),
        ({**CPU, "dtype": torch.float64}, ("cpu",), "reference"),
        ({**H100, "dtype": torch.float64}, ("triton", "cuda"), "reference"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", FULL_ROWS)
def test_auto_takes_the_first_that_can_serve(op, call, available, expected, installed):
    installed(*available)
    assert dispatch.choose(op, **call) == expected
    assert dispatch.choose(op, **call, backend="auto") == expected


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_has_a_reference_that_serves_all(op):
    assert dispatch.backends(op)[0] == "reference"
    assert set(dispatch.backends(op)) <= set(dispatch.BACKENDS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for call in (CPU, H100):
            named = {**call, "dtype": dtype}
            assert dispatch.choose(op, **named, backend="reference") == "reference"


@pytest.mark.parametrize("op", FULL_ROWS)
def test_full_rows_have_every_cell(op):
    assert dispatch.backends(op) == ("reference", "cpu", "triton", "cuda")


REFUSED = [
    (CPU, "cpu", (), "no cpu here"),
    (CPU, "cuda", ("cuda",), "CUDA"),
    (CPU, "triton", ("triton",), "CUDA"),
    (H100, "cpu", ("cpu",), "CPU"),
    (H100, "triton", (), "no triton here"),
    ({**CPU, "dtype": torch.float64}, "cpu", ("cpu",), "torch.float64"),
    ({**H100, "capability": (7, 5)}, "cuda", ("cuda",), "(7, 5)"),
]


@pytest.mark.parametrize(("call", "backend", "available", "why"), REFUSED, ids=str)
def test_a_named_backend_that_cannot_serve_is_an_error(call, backend, available, why, installed):
    installed(*available)
    with pytest.raises(ValueError) as caught:
        dispatch.choose("rms_norm", **call, backend=backend)
    for part in ("rms_norm:", repr(backend), why, "backend='auto'"):
        assert part in str(caught.value)
    preferred = dispatch.prefer("rms_norm", **call, backend=backend)
    assert preferred == dispatch.choose("rms_norm", **call)


def test_a_backend_without_a_cell_is_an_error():
    cells = dispatch.backends("rms_norm_backward")
    missing = next(name for name in dispatch.BACKENDS if name not in cells)
    with pytest.raises(ValueError, match=f"rms_norm_backward has no {missing} implementation"):
        dispatch.choose("rms_norm_backward", **CPU, backend=missing)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="op must be one of .*'softmax'"):
        dispatch.choose("softmax", **CPU)
    for choose in (dispatch.choose, dispatch.prefer):
        with pytest.raises(ValueError, match="rms_norm: backend must be .*'fast'"):
            choose("rms_norm", **CPU, backend="fast")


def test_prefer_takes_the_named_backend_where_it_can_serve(installed):
    installed("cpu")
    assert dispatch.prefer("rms_norm", **CPU, backend="reference") == "reference"
    assert dispatch.prefer("rms_norm", **CPU, backend="cpu") == "cpu"
    assert dispatch.prefer("rms_norm", **CPU, backend="auto") == "cpu"


def test_choices_are_remembered(installed):
    installed("cpu")
    dispatch.choose("rms_norm", **CPU)
    hits = dispatch.choose.cache_info().hits
    dispatch.choose("rms_norm", **CPU)
    assert dispatch.choose.cache_info().hits == hits + 1


def test_a_cell_can_refuse_by_facts(installed, monkeypatch):
    installed("cpu")
    cell = dispatch.OPS["rms_norm"]["cpu"]
    picky = cell._replace(refuses=lambda facts: "too wide" if facts.get("hidden", 0) > 8 else None)
    monkeypatch.setitem(dispatch.OPS["rms_norm"], "cpu", picky)
    assert dispatch.choose("rms_norm", **CPU, facts=(("hidden", 8),)) == "cpu"
    assert dispatch.choose("rms_norm", **CPU, facts=(("hidden", 9),)) == "reference"
    with pytest.raises(ValueError, match="too wide"):
        dispatch.choose("rms_norm", **CPU, facts=(("hidden", 9),), backend="cpu")


@pytest.mark.parametrize("batch_invariant", [0, 1])
def test_linear_on_a_gpu_is_torch_s_unless_its_bits_must_not_depend_on_the_batch(
    batch_invariant, installed
):
    installed("triton", "cuda")
    call = {**H100, "facts": (("batch_invariant", batch_invariant),)}
    expected = "triton" if batch_invariant else "reference"
    assert dispatch.choose("linear", **call) == expected
    assert dispatch.prefer("linear", **call, backend="cuda") == expected
    assert dispatch.choose("linear", **call, backend="triton") == "triton"
    installed("cuda")
    assert dispatch.choose("linear", **call) == "reference"


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_a_bound_op_asks_again_where_its_cell_wants_that(inference, auto, installed, monkeypatch):
    installed("cpu")
    served = []
    row = dispatch.OPS["route_experts"]
    narrow = dispatch.Cell(
        lambda *inputs: served.append("cpu") or row["reference"].run(*inputs),
        refuses=lambda facts: "too many" if facts.get("experts", 0) > 8 else None,
        auto=lambda facts: auto,  # who prefers a cell by name gets it all the same
        asks_each_call=True,
    )
    monkeypatch.setitem(row, "cpu", narrow)
    bound = dispatch.BoundOp("route_experts", "cpu")
    with torch.inference_mode(inference):
        for experts in (8, 9, 8):
            assert bound(torch.ones(1, experts), 2, None)[0].tolist() == [[0.5, 0.5]]
            served.append(experts)
    assert served == ["cpu", 8, 9, "cpu", 8]
    x = torch.ones(1, 8, requires_grad=True)
    with torch.enable_grad():
        bound(x, 2, None)[0].sum().backward()  # its backward prefers the same
    assert x.grad.shape == x.shape
    assert bound.backend == "cpu", "what it prefers, for info"


def test_a_bound_op_may_leave_every_choice_open(monkeypatch):
    """And goes past torch's dispatcher in no_grad as in inference mode: `generate()` runs there."""
    bound = dispatch.BoundOp("rms_norm", "auto")
    called = []
    monkeypatch.setattr(bound, "_op", lambda *inputs: called.append(inputs[-1]))
    x, weight = torch.full((2, 8), 3.0), torch.ones(8)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(bound(x, weight, 0.0), torch.ones(2, 8))
    assert called == []
    bound(x, weight, 0.0)
    assert called == ["auto"], "autograd must see the op"


def test_a_public_call_goes_past_the_dispatcher_where_nobody_would_notice(monkeypatch):
    """An argument that is more than its memory, and whoever intercepts, still meets the op."""
    row, dispatched = dispatch.OPS["silu_mul"], []
    reference = row["reference"].run

    def spy(gate_up):
        dispatched.append(any(frame.filename == torch._ops.__file__ for frame in inspect.stack()))
        return reference(gate_up)

    monkeypatch.setitem(row, "reference", dispatch.Cell(spy))
    silu_mul = functools.partial(ops.silu_mul, backend="reference")
    x = torch.randn(4, 8)
    mirrored = torch._neg_view(-x)  # as conj().imag gives them: memory holds -x
    expected = silu_mul(x)
    assert dispatched.pop(), "autograd must see the op"
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(silu_mul(x), expected)
            assert not dispatched.pop()
            torch.testing.assert_close(silu_mul(mirrored), expected)
            with torch.overrides.BaseTorchFunctionMode():
                silu_mul(x)
            assert dispatched == [True, True]
            torch.testing.assert_close(torch.vmap(silu_mul)(x[:, None])[:, 0], expected)
            assert silu_mul(x.to("meta")).is_meta
            dispatched.clear()


def test_reference_is_always_available():
    assert dispatch.unavailable("reference") is None
    for backend in dispatch.BACKENDS:
        reason = dispatch.unavailable(backend)
        assert reason is None or len(reason) > 10, "a reason is a sentence, not a flag"


@pytest.mark.parametrize(("interpret", "available"), [("0", False), ("1", True)])
def test_triton_serves_the_cpu_under_its_interpreter(interpret, available):
    code = "from mistral_kernels.ops import dispatch; print(dispatch.unavailable('triton'))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (shown.stdout.strip() == "None") == available


@pytest.mark.parametrize("name", ops.__all__)
def test_public_functions_follow_one_form(name):
    function = getattr(ops, name)
    parameters = inspect.signature(function).parameters
    assert list(parameters)[-1] == "backend", "backend is the last argument"
    assert parameters["backend"].default == "auto"
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    schema = getattr(torch.ops.mistral_kernels, name).default._schema
    assert [argument.name for argument in schema.arguments] == list(parameters)
    assert not any(argument.has_default_value() for argument in schema.arguments)
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in function.__doc__, f"{name}'s docstring has no {section}"


@pytest.mark.parametrize("name", ops.__all__)
def test_a_trailing_underscore_means_in_place(name):
    schema = getattr(torch.ops.mistral_kernels, name).default._schema
    written = {argument.name for argument in schema.arguments if argument.is_write}
    caches = {"k_cache", "v_cache"}
    expected = {
        "rope_": {"q", "k"},
        "store_kv_": caches,
        "decode_attention": caches | {"workspace"},
    }
    assert written == expected.get(name, set())


def test_forward_mode_is_refused():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="rms_norm: x carries a forward-mode tangent"):
        torch.func.jvp(lambda x: ops.rms_norm(x, weight, 1e-5), (x,), (x,))

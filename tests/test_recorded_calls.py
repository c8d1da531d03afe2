"""Recorded calls of the compiled core: the same results on new contents, and what is refused."""

import threading
from functools import partial

import pytest
import torch

from mistral_kernels import ops
from mistral_kernels.ops import dispatch
from mistral_kernels.ops.recorded_calls import NotRecordableError, RecordedCalls

pytestmark = pytest.mark.skipif(dispatch.unavailable("cpu") is not None, reason="no compiled core")

FIRST = torch.tensor([0])


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def bound(op: str) -> dispatch.BoundOp:
    return dispatch.BoundOp(op, "cpu")


def gated(x, weight, norm):
    """A norm, a product, and SwiGLU of it: three calls."""
    gate_up = bound("linear")(bound("rms_norm")(x, norm, 1e-5), weight, False)
    return bound("silu_mul")(gate_up.view(len(x), -1))


def test_replay_gives_the_bits_of_a_new_run():
    x, weight, norm = torch.randn(3, 32), torch.randn(48, 32), torch.randn(32)
    recorded = RecordedCalls(lambda: gated(x, weight, norm))
    assert [call.op for call in recorded.calls] == ["rms_norm_cpu", "linear_cpu", "silu_mul_cpu"]
    assert torch.equal(recorded.result, gated(x, weight, norm))
    for _ in range(3):
        x.normal_()
        recorded.result.fill_(torch.nan)
        recorded.replay()
        assert torch.equal(recorded.result, gated(x, weight, norm))


def test_what_torch_writes_is_written_again():
    x, counter = torch.randn(3, 32), torch.zeros(())

    def twice():
        counter.add_(1)
        normed = bound("rms_norm")(x, x[0], 1e-5)
        return torch.cat((normed, x), 1, out=x.new_empty(3, 64))

    recorded = RecordedCalls(twice)
    x.normal_()
    recorded.replay()
    assert counter == 2 and len(recorded.calls) == 3
    assert torch.equal(recorded.result, torch.cat((bound("rms_norm")(x, x[0], 1e-5), x), 1))


def test_the_memory_of_all_calls_stays():
    """That of what went in, too, which nobody else may hold any more."""
    x, weight, norm = torch.randn(3, 32), torch.randn(48, 32), torch.randn(32)
    expected = gated(x, weight, norm)
    recorded = RecordedCalls(partial(gated, x, weight, norm))
    del x, weight, norm
    # What new tensors of these sizes would get, had any of the memory been given back.
    shapes = ((3, 32), (48, 32), (32,), (3, 48), (3, 24))
    others = [torch.full(shape, torch.nan) for shape in shapes for _ in range(20)]
    recorded.result.zero_()
    recorded.replay()
    assert torch.equal(recorded.result, expected)
    assert all(other.isnan().all() for other in others)


@pytest.mark.parametrize(
    "compute, name",
    [
        (lambda x: x + 1, "add"),
        (lambda x: torch.add(x, 1, out=None), "add"),
        (lambda x: torch.mm(x, x.T), "mm"),
        (lambda x: x.sum().item(), "sum"),
        (lambda x: x[FIRST], "__getitem__ makes a copy"),
        (lambda x: x.transpose(0, 1).reshape(-1), "reshape makes a copy"),
        (lambda x: torch.empty_like(x), "empty_like"),
    ],
)
def test_what_a_replay_would_leave_out_is_refused(compute, name):
    x, core = torch.randn(3, 32), dispatch.native_extension()
    with pytest.raises(NotRecordableError, match=name):
        RecordedCalls(lambda: compute(bound("rms_norm")(x, x[0], 1e-5)))
    assert dispatch.native_extension() is core  # nothing is recorded any more


def test_the_reference_is_refused():
    x = torch.randn(3, 32)
    with pytest.raises(NotRecordableError):
        RecordedCalls(lambda: dispatch.BoundOp("rms_norm", "reference")(x, x[0], 1e-5))


def test_other_threads_are_not_recorded():
    x = torch.randn(3, 32)

    def both():
        thread = threading.Thread(target=ops.rms_norm, args=(x, x[0], 1e-5))
        thread.start()
        thread.join()
        return bound("rms_norm")(x, x[0], 1e-5)

    assert len(RecordedCalls(both).calls) == 1

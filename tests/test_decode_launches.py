"""What a decode step launches: few ops a layer, the same at any length, and none that waits."""

from collections import defaultdict

import pytest
import torch
from test_decode_step import GREEDY, MOE, SAMPLINGS, SHAPES, filled_cache
from tiny_models import random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mistral_kernels.model import decode_step
from mistral_kernels.model.decode_step import Fed, decode
from mistral_kernels.ops import dispatch

ALLOCATES = ("aten::empty", "aten::new_empty")
# What reads on the host what the device has computed, or moves it there.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::item",
    "aten::bincount",
}
WAITS |= {"aten::is_nonzero", "aten::equal", "aten::masked_select", "aten::is_pinned"}


class Launches(TorchDispatchMode):
    """Collects all ops but views and allocations, with the shapes and dtypes of their tensors."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.name().startswith(ALLOCATES):
            leaves = tree_leaves((args, kwargs or {}))
            shapes = [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves]
            self.names.append(func.name())
            self.calls.append((func.name(), *shapes))
        return func(*args, **(kwargs or {}))


def launches(model, cache, places, sampling, monkeypatch) -> Launches:
    """What the device's part of one step launches."""
    recorder, compute = Launches(), decode_step.DecodeStep.compute
    with monkeypatch.context() as patch:

        def recording(*arguments) -> None:
            with recorder:
                compute(*arguments)

        patch.setattr(decode_step.DecodeStep, "compute", recording)
        decode(model, cache, [Fed(at, 5, 0.5) for at in places], sampling)
    return recorder


@pytest.mark.parametrize(("shape", "most"), [({}, 8), (MOE, 10)], ids=SHAPES)
def test_launches_of_a_layer_and_outside(shape, most, monkeypatch):
    counts = []
    for layers in (1, 3):
        model = random_model(dtype=torch.float32, layers=layers, windows=(4,) * layers, **shape)
        cache = filled_cache(model)
        # All five places: the embedding, the last norm and the output; greedily argmax, logprobs
        # in two, and what the next step reads in four.
        counts.append(len(launches(model, cache, range(5), GREEDY, monkeypatch).names))
        # Fewer: one block table for all layers, whatever their number.
        fewer = launches(model, cache, [1, 3], GREEDY, monkeypatch).names
        assert len(fewer) == counts[-1] + 1 and fewer[0].startswith("aten::index_select")
    a_layer = (counts[1] - counts[0]) / 2
    assert a_layer <= most
    assert counts[0] - a_layer <= 10


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn"])
def test_a_step_does_not_depend_on_lengths_and_never_waits(sampling, monkeypatch):
    model = random_model(dtype=torch.bfloat16, windows=(6, None), **MOE)
    cache = filled_cache(model)
    first = launches(model, cache, [0, 2, 3], sampling, monkeypatch)
    for _ in range(20):  # around the ring of the first layer
        decode(model, cache, [Fed(at, 5, 0.5) for at in (0, 2, 3)], sampling)
    later = launches(model, cache, [0, 2, 3], sampling, monkeypatch)
    assert first.calls == later.calls
    assert not WAITS & {name.split(".")[0] for name in first.names}
    # Changes of dtype alone: nothing goes to another device.
    devices = {leaf for call in first.calls for leaf in call if isinstance(leaf, torch.device)}
    assert devices <= {torch.device("cpu")}


def test_references_that_wait_say_so(monkeypatch):
    model = random_model(dtype=torch.float32, backend="reference", **MOE)
    dense = random_model(dtype=torch.float32, backend="reference")
    monkeypatch.setattr(dispatch, "watched", lambda x: False)  # the cells' own ops are seen
    names = defaultdict(set)
    for each in (model, dense):
        cache = filled_cache(each)
        for op, kernel in each.kernels.items():

            def run(*inputs, op=op, kernel=kernel):
                with Launches() as recorder:
                    out = kernel(*inputs)
                names[op] |= {name.split(".")[0] for name in recorder.names}
                return out

            each.kernels[op] = run
        decode(each, cache, [Fed(0, 5, 0.0), Fed(3, 5, 0.0)], GREEDY)
    waiting = {op for op, found in names.items() if found & WAITS}
    assert waiting == {op for op in names if dispatch.OPS[op]["reference"].waits}
    assert waiting == {"decode_attention", "expert_mlp"}

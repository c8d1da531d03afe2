"""Decode steps on the CPU replay recorded calls: with the bits of steps that do not."""

import copy
import gc
import weakref

import pytest
import torch
from tiny_models import random_model
from torch import nn

from mistral_kernels import generate
from mistral_kernels.model import recorded_steps
from mistral_kernels.model.decode_step import Fed, decode
from mistral_kernels.model.random_weights import in_few_bits
from mistral_kernels.model.sampling import Sampling
from mistral_kernels.ops import dispatch
from mistral_kernels.routing import recorded

pytestmark = pytest.mark.skipif(dispatch.unavailable("cpu") is not None, reason="no compiled core")
WINDOWS = (4, None, 6)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def small_model(**fields):
    return random_model(
        **{"windows": WINDOWS, "layers": len(WINDOWS), "dtype": torch.float32, **fields}
    )


def steps_of(cache) -> dict[int, int | None]:
    """Rows -> calls of a recorded step, None where it could not be recorded."""
    found = cache.recordings._steps.items()
    return {rows: step.calls and len(step.calls.calls) for rows, step in found}


class Pair:
    """Two caches of a model, which get the same tokens; steps of the second are not recorded."""

    def __init__(self, model, batch=2, prompt=5, max_tokens=40):
        self.model, self.batch = model, batch
        self.caches = [model.new_cache(batch, max_tokens) for _ in range(2)]
        self.feed([prompt] * batch)

    def feed(self, seqlens) -> torch.Tensor:
        ids = torch.randint(self.model.config.vocab, (sum(seqlens),))
        logits = self.model.forward(ids, seqlens, self.caches[0])
        # torch's dispatcher has to see what might have a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            expected = self.model.forward(ids.clone(), seqlens, self.caches[1])
        assert torch.equal(logits, expected)
        return logits

    def step(self, times=1) -> torch.Tensor:
        for _ in range(times):
            logits = self.feed([1] * self.batch)
        return logits


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_over_several_windows(experts, dtype):
    pair = Pair(small_model(experts=experts, top_k=2 if experts else 0, dtype=dtype))
    pair.step(20)
    assert steps_of(pair.caches[0]) == {2: len(WINDOWS) * 8 + 2} and not steps_of(pair.caches[1])


def test_few_bits():
    full = small_model(hidden=32, ffn_dim=64, experts=4, top_k=2)
    pair = Pair(in_few_bits(full, "int8"))
    pair.step(10)
    assert steps_of(pair.caches[0])[2]


def test_chunks_padding_and_rollback_between_steps():
    pair = Pair(small_model(), batch=3, prompt=4)
    for cache in pair.caches:
        cache.starts = [0, 2, 1]
    pair.step(3)
    pair.feed([1, 3, 0])
    pair.step(2)
    for cache in pair.caches:
        cache.reset(1)
    pair.feed([0, 2, 0])
    pair.step(8)


def test_logits_stay_when_another_step_is_taken():
    pair = Pair(small_model())
    kept = [(logits, logits.clone()) for logits in (pair.step() for _ in range(4))]
    assert all(torch.equal(logits, copied) for logits, copied in kept)


def test_a_copy_of_a_cache_has_its_own_steps():
    pair = Pair(small_model())
    pair.step(2)
    pair.caches[0] = copy.deepcopy(pair.caches[0])
    assert steps_of(pair.caches[0]) == {}
    pair.step(3)


def turn_threads(model):
    torch.set_num_threads(3 - min(torch.get_num_threads(), 2))


def exchange_a_weight(model):
    model.layers[1].attention.wo = nn.Parameter(2 * model.layers[1].attention.wo, False)


CHANGES = {
    "a hook": lambda model: model.layers[0].register_forward_hook(
        lambda module, args, out: (2 * out[0], out[1])
    ),
    "another forward": lambda model: setattr(
        model.layers[1].feed_forward, "forward", lambda x, step: x.sin()
    ),
    "a weight changed in its place": lambda model: model.layers[2].attention_norm.mul_(3),
    "a weight exchanged": exchange_a_weight,
    "a number": lambda model: setattr(model.layers[1].attention, "scale", 0.1),
    "the backend": lambda model: model.set_backend("reference"),
    "threads": turn_threads,
    "rotary tables": lambda model: setattr(model, "_tables", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_reaches_the_next_step(change):
    threads = torch.get_num_threads()
    pair = Pair(small_model())
    pair.step(3)
    try:
        CHANGES[change](pair.model)
        pair.step(3)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("fields, batch", [({}, 49), ({"dtype": torch.float64}, 2)])
def test_what_torch_computes_is_not_recorded(fields, batch):
    pair = Pair(small_model(**fields), batch=batch)
    pair.step(3)
    assert steps_of(pair.caches[0]) == {batch: None}


def count_hooked(model, calls):
    model.layers[1].register_forward_pre_hook(lambda *call: calls.append(1))


def count_wrapped(model, calls):
    forward = model.layers[1].forward

    def counted(*inputs):
        calls.append(1)
        return forward(*inputs)

    model.layers[1].forward = counted


def count_in_a_class(model, calls):
    class Counting(type(model.layers[1])):
        def forward(self, *inputs):
            calls.append(1)
            return super().forward(*inputs)

    model.layers[1].__class__ = Counting


@pytest.mark.parametrize("count", [count_hooked, count_wrapped, count_in_a_class])
def test_code_of_others_runs_in_every_step(count):
    pair, calls = Pair(small_model()), []
    pair.step(2)
    count(pair.model, calls)
    pair.step(4)
    assert len(calls) == 2 * 4  # of both caches


def test_steps_of_the_last_numbers_of_rows_are_kept(monkeypatch):
    monkeypatch.setattr(recorded_steps, "KEPT", 2)
    model = small_model()
    cache = model.new_cache(4, 40)
    kept = []
    for rows in (4, 3, 4, 2, 1):
        decode(
            model, cache, [Fed(place, 3, 0.0) for place in range(rows)], Sampling(0.0, None, 1.0)
        )
        kept.append([*steps_of(cache)])
    assert kept == [[4], [4, 3], [3, 4], [4, 2], [2, 1]]


def test_who_watches_routes_sees_every_step():
    pair = Pair(small_model(experts=4, top_k=2))
    pair.step(2)
    with recorded(pair.model) as routes:
        pair.step(3)
    assert len(routes) == 2 * 3 * len(WINDOWS)
    pair.step(2)


def test_a_cache_lets_go_of_its_model():
    model = small_model()
    cache = model.new_cache(1, 20)
    generate([[1, 2]], model, max_tokens=3, cache=cache)
    model, alive = None, weakref.ref(model)
    gc.collect()
    assert alive() is not None, "nothing is kept"
    cache.forget_steps()
    gc.collect()
    assert alive() is None and cache.lengths == [4]

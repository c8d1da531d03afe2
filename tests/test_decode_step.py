"""The decode step over static tensors: the tokens of `forward` and `sample`, bit for bit, in few
launches that do not depend on the length of a sequence and never wait."""

import copy
from collections import defaultdict

import pytest
import torch
from tiny_models import poison, random_model, random_prompts, shuffle_pages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mistral_kernels.model import decode_step
from mistral_kernels.model.decode_step import Fed, decode
from mistral_kernels.model.sampling import Sampling, logprobs_of, sample
from mistral_kernels.ops import dispatch
from mistral_kernels.routing import recorded

GREEDY = Sampling(0.0, None, 1.0)
SAMPLINGS = (GREEDY, Sampling(0.8, 20, 0.9))
MOE = {"experts": 4, "top_k": 2}
SHAPES = {"dense": {}, "moe": MOE}
# Rows of the cache that go on: all, some, one; more than a power of two of them.
GOING_ON = ([0, 1, 2, 3, 4], [0, 2, 4], [3], [1, 2, 3])
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


def filled_cache(model):
    """A cache of five places with prompts of several lengths, one of them beyond its ring."""
    cache = shuffle_pages(poison(model.new_cache(5, 80, page_size=16)))
    prompts = random_prompts([3, 50, 1, 8, 17])
    with torch.inference_mode():
        ids = torch.tensor(sum(prompts, []))
        model.forward(ids, [len(prompt) for prompt in prompts], cache)
    return cache


def by_forward(model, cache, fed, sampling):
    """What `decode` does, by the model's own call and without static tensors."""
    seqlens = [0] * cache.batch
    for row in fed:
        seqlens[row.place] = 1
    with torch.inference_mode():
        ids = torch.tensor([row.token for row in fed])
        logits = model.forward(ids, seqlens, cache, last_only=True)
        logits = logits[[row.place for row in fed]]
        tokens = sample(logits, [row.draw for row in fed], **sampling._asdict())
        return tokens.tolist(), logprobs_of(logits, tokens).tolist()


def schedule(step) -> list:
    """Tokens and logprobs of steps in which other places go on every third time."""
    tokens, results = dict.fromkeys(range(5), 7), []
    for turn in range(12):
        going = GOING_ON[turn // 3]
        fed = [Fed(at, tokens[at], 0.07 * ((turn + at) % 14)) for at in going]
        drawn = step(fed)
        results.append(drawn)
        tokens.update(zip(going, drawn[0], strict=True))
    return results


def assert_rings_equal(one, other) -> None:
    for a, b in zip(one.layers, other.layers, strict=True):
        for x, y in ((a.k, b.k), (a.v, b.v)):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_forward_and_sample(backend, shape, sampling, padded, monkeypatch):
    if padded:  # the rows that a GPU would take: 8 or 5 of 5, 4, 1, 4
        rows = decode_step.step_rows
        monkeypatch.setattr(decode_step, "step_rows", lambda n, batch, _: rows(n, batch, "cuda"))
    dtype = torch.float64 if backend == "reference" else torch.float32
    model = random_model(dtype=dtype, backend=backend, windows=(6, None), **shape)
    caches = filled_cache(model), filled_cache(model)
    got = schedule(lambda fed: decode(model, caches[0], fed, sampling))
    expected = schedule(lambda fed: by_forward(model, caches[1], fed, sampling))
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
    # Torch's GEMM may add up in another order for another number of rows, and `forward` computes
    # logits for all five places.
    same = len(got) if backend == "cpu" else 3
    assert got[:same] == expected[:same]
    for (_, a), (_, b) in zip(got, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-10)
    if backend == "cpu" or not padded:
        assert_rings_equal(*caches)
    assert caches[0].lengths == caches[1].lengths


def test_idle_rows_choose_no_expert(monkeypatch):
    monkeypatch.setattr(decode_step, "step_rows", lambda n, batch, _: {3: 4, 2: 5}[n])
    model = random_model(dtype=torch.float32, **MOE)
    cache = filled_cache(model)
    for places, idle in (([0, 2, 4], [3]), ([1, 3], [0, 2, 4])):
        with recorded(model) as routes:
            decode(model, cache, [Fed(at, 5, 0.0) for at in places], GREEDY)
        assert len(routes) == 2
        for route in routes:
            chosen = route.expert_ids.amax(1) >= 0
            assert [row for row in range(len(chosen)) if not chosen[row]] == idle


def test_starts_and_what_a_caller_does_between_steps():
    model = random_model(dtype=torch.float32, windows=(6, None))
    caches = [filled_cache(model) for _ in range(2)]
    ways = (
        lambda fed: decode(model, caches[0], fed, GREEDY),
        lambda fed: by_forward(model, caches[1], fed, GREEDY),
    )
    results = []
    for cache, step in zip(caches, ways, strict=True):
        drawn = [step([Fed(at, 3, 0.0) for at in (0, 4)]) for _ in range(2)]
        cache.starts[4] = 15
        drawn.append(step([Fed(0, 1, 0.0), Fed(4, 1, 0.0)]))
        cache.reset(0)
        drawn.append(step([Fed(0, 1, 0.0), Fed(4, 2, 0.0)]))
        results.append(drawn)
    assert results[0] == results[1]
    assert caches[0].lengths == [1, 50, 1, 8, 21]


def test_a_copy_of_a_cache_goes_its_own_way():
    model = random_model(dtype=torch.float32)
    cache = filled_cache(model)
    fed = [Fed(0, 3, 0.0), Fed(3, 4, 0.0)]
    decode(model, cache, fed, GREEDY)
    twin = copy.deepcopy(cache)
    assert twin.decode_steps is None
    assert decode(model, cache, fed, GREEDY) == decode(model, twin, fed, GREEDY)
    assert_rings_equal(cache, twin)


def test_a_sequence_that_outgrows_its_cache_is_refused_before_anything_is_fed():
    model = random_model(dtype=torch.float32)
    cache = model.new_cache(2, 1)
    decode(model, cache, [Fed(0, 3, 0.0)], GREEDY)
    with pytest.raises(ValueError, match="sequence 0 would reach 2 tokens"):
        decode(model, cache, [Fed(0, 3, 0.0), Fed(1, 3, 0.0)], GREEDY)
    assert cache.lengths == [1, 0]


# What a step launches


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

"""The decode step over static tensors: the tokens of `forward` and `sample`, bit for bit."""

import copy

import pytest
import torch
from tiny_models import poison, random_model, random_prompts, shuffle_pages

from mistral_kernels import Transformer, generate
from mistral_kernels.model import decode_step
from mistral_kernels.model.decode_step import Fed, decode
from mistral_kernels.model.sampling import Sampling, logprobs_of, sample
from mistral_kernels.routing import recorded

GREEDY = Sampling(0.0, None, 1.0)
SAMPLINGS = (GREEDY, Sampling(0.8, 20, 0.9))
MOE = {"experts": 4, "top_k": 2}
SHAPES = {"dense": {}, "moe": MOE}
# Rows of the cache that go on: all, some, one; more than a power of two of them.
GOING_ON = ([0, 1, 2, 3, 4], [0, 2, 4], [3], [1, 2, 3])


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


# On a GPU


def gpu_model(**changes) -> Transformer:
    return random_model(dtype=torch.bfloat16, head_dim=64, hidden=64, **changes).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3, "top_p": 0.9}])
@pytest.mark.parametrize("shape", [{}, {**MOE, "ffn_dim": 64}], ids=["dense", "moe"])
def test_replayed_tokens_are_those_of_eager_steps(options, shape):
    model = gpu_model(windows=(33, None), max_batch_size=3, **shape)
    prompts, results = random_prompts([3, 17, 1, 8, 5]), []
    for model.use_graphs in (True, False):
        results.append(generate(prompts, model, max_tokens=150, chunk_size=4, **options))
    assert results[0] == results[1]


@pytest.mark.gpu
def test_a_step_never_waits_and_goes_on_after_reset_and_rollback():
    model = gpu_model(windows=(33, None))
    caches = [model.new_cache(4, 300, lookahead=8) for _ in range(2)]
    results = []
    for model.use_graphs, cache in zip((True, False), caches, strict=True):
        drawn = []
        for _ in range(3):  # the second captures
            decode(model, cache, [Fed(at, 3, 0.5) for at in (0, 1, 3)], GREEDY)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for turn in range(80):
                if turn == 50:
                    cache.rollback([5, 5, 0, 5])
                if turn == 60:
                    cache.reset(1)
                drawn.append(decode(model, cache, [Fed(at, 3, 0.5) for at in (0, 1, 3)], GREEDY))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(drawn)
    assert caches[0].decode_steps._steps[4].graph is not None
    assert caches[1].decode_steps._steps[4].graph is None
    assert results[0] == results[1]

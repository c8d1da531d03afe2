"""CUDA graphs of decode steps: captured once for a number of rows, dropped with what they read.

Without a GPU a graph is stood in for by the function that it would have captured.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import random_model, random_prompts

from mistral_kernels import Transformer, generate, stream
from mistral_kernels.model import decode_step, step_graphs
from mistral_kernels.model.decode_step import DecodeStep, Fed, decode
from mistral_kernels.model.sampling import Sampling
from mistral_kernels.model.step_graphs import StepGraphs, capture_refusal, graph_bytes
from mistral_kernels.ops import dispatch
from mistral_kernels.routing import recorded

GREEDY = Sampling(0.0, None, 1.0)
MOE = {"experts": 4, "top_k": 2}
PROMPTS = random_prompts([3, 17, 1, 8, 5])


class FakeGraph:
    """As a real one: made without computing anything, it repeats what was captured."""

    def __init__(self, compute):
        self.compute, self.replays = compute, 0

    def replay(self) -> None:
        self.replays += 1
        self.compute()


class Captures:
    """The graphs that were captured, and how many steps were run op by op."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.graphs: list[FakeGraph] = []
        self._threads: list[int] = []  # of each step that was computed, replayed ones too
        self._compute = DecodeStep.compute
        rows = decode_step.step_rows
        patch = monkeypatch.setattr
        patch(decode_step, "step_rows", lambda n, batch, _: rows(n, batch, "cuda"))
        patch(step_graphs, "capture_refusal", lambda model, cache: None)
        patch(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        patch(StepGraphs, "capture", self._capture)
        patch(DecodeStep, "compute", lambda step, model: self._computed(step, model))

    @property
    def warmed(self) -> int:
        return len(self._threads) - sum(graph.replays for graph in self.graphs)

    def _computed(self, step, model) -> None:
        self._threads.append(threading.get_ident())
        self._compute(step, model)

    def _capture(self, compute) -> FakeGraph:
        assert self._threads[-1] == threading.get_ident(), "cuBLAS has no handle here"
        self.graphs.append(FakeGraph(compute))
        return self.graphs[-1]


@pytest.fixture
def captures(monkeypatch) -> Captures:
    return Captures(monkeypatch)


def steps(model, cache, places, count: int, sampling: Sampling = GREEDY) -> None:
    for _ in range(count):
        decode(model, cache, [Fed(at, 3, 0.5) for at in places], sampling)


def test_a_graph_for_each_number_of_rows(captures):
    model = random_model(dtype=torch.float32)
    cache = model.new_cache(6, 60)
    for places, graphs in (([0], 1), ([4], 1), ([0, 5], 2), ([1, 2, 3], 3), ([0, 1, 2, 5], 3)):
        steps(model, cache, places, 3)
        assert len(captures.graphs) == graphs
    steps(model, cache, range(5), 3)
    steps(model, cache, range(6), 3)  # of six places, and so is the one before
    assert len(captures.graphs) == 4 and captures.warmed == 8
    assert [graph.replays for graph in captures.graphs] == [4, 1, 4, 4]


def test_one_step_alone_captures_nothing(captures):
    model = random_model(dtype=torch.float32, max_batch_size=2)
    generate(PROMPTS[:2], model, max_tokens=2)
    assert captures.warmed == 1 and not captures.graphs


def test_steps_of_one_stream_may_be_taken_by_many_threads(captures):
    """As a server does that asks for each token in some thread of a pool."""
    model = random_model(dtype=torch.float32)
    events = stream([[1, 2, 3]], model, max_tokens=6)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        tokens = [pool.submit(next, events).result()[1] for pool in (one, other) * 3]
    assert len(captures.graphs) == 1
    assert [tokens] == generate([[1, 2, 3]], model, max_tokens=6)[0]


@pytest.mark.parametrize("name", ["forward", "run"])
def test_a_forward_or_run_of_the_callers_is_called_for_every_step(name, captures):
    model, calls = random_model(dtype=torch.float32), []
    own = getattr(model, name)

    def counted(*args, **kwargs):
        calls.append(name)
        return own(*args, **kwargs)

    setattr(model, name, counted)
    generate([[1, 2, 3]], model, max_tokens=6)
    assert len(calls) == 6 and not captures.graphs


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3, "top_k": 9}])
@pytest.mark.parametrize("shape", [{}, MOE], ids=["dense", "moe"])
def test_generation_is_as_without_graphs(options, shape, monkeypatch):
    model = random_model(dtype=torch.float32, windows=(5, None), max_batch_size=3, **shape)
    expected = generate(PROMPTS, model, max_tokens=9, chunk_size=4, **options)
    captures = Captures(monkeypatch)
    assert generate(PROMPTS, model, max_tokens=9, chunk_size=4, **options) == expected
    assert any(graph.replays for graph in captures.graphs)


def test_a_cache_keeps_its_graphs_from_call_to_call(captures):
    model = random_model(dtype=torch.float32)
    cache = model.new_cache(1, 60, lookahead=4)
    first = generate([[1, 2, 3]], model, max_tokens=5, cache=cache)
    cache.rollback(4)
    events = stream([first[0][0][:1]], model, max_tokens=4, cache=cache)
    assert [token for _, token, _ in events] == first[0][0][1:]
    cache.reset(0)
    assert generate([[1, 2, 3]], model, max_tokens=5, cache=cache) == first
    assert len(captures.graphs) == 1 and captures.warmed == 2
    generate([[1, 2, 3]], model, max_tokens=5, cache=model.new_cache(1, 60))
    assert len(captures.graphs) == 2 and captures.warmed == 4


def half(model: Transformer) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def new_parameter(model: Transformer) -> None:
    old = model.layers[1].attention.wo
    model.layers[1].attention.wo = torch.nn.Parameter(old * 2, requires_grad=False)


def new_data(model: Transformer) -> None:
    model.norm.data = model.norm.data * 2


def new_module(model: Transformer) -> None:
    model.layers[0].feed_forward = copy.deepcopy(model.layers[1].feed_forward)


def longer_tables(model: Transformer) -> None:
    model.rope_tables(500)


def no_graphs_and_back(model: Transformer) -> None:
    model.use_graphs = False
    model.use_graphs = True


def adapted(model: Transformer) -> None:
    with torch.no_grad():  # as load_lora does
        model.layers[0].attention.wo.mul_(2)


@pytest.mark.parametrize(
    ("change", "captured"),
    [
        (half, 2),
        (lambda model: model.set_backend("reference"), 2),
        (new_parameter, 2),
        (new_data, 2),
        (new_module, 2),
        (longer_tables, 2),
        (no_graphs_and_back, 1),
        (adapted, 1),  # what is changed in place is read as it is
    ],
)
def test_what_a_graph_reads_is_what_the_model_has(change, captured, captures):
    model = random_model(dtype=torch.float32)
    caches = [model.new_cache(3, 60) for _ in range(2)]
    steps(model, caches[0], [0, 2], 3)
    change(model)
    steps(model, caches[0], [0, 2], 3)
    assert len(captures.graphs) == captured
    # Against a fresh cache: the tokens of the model as it is now, after the same ones.
    cache = model.new_cache(3, 60)
    steps(model, cache, [0, 2], 3)
    fed = [Fed(0, 3, 0.5), Fed(2, 3, 0.5)]
    caches[0].reset()
    steps(model, caches[0], [0, 2], 3)
    assert decode(model, caches[0], fed, GREEDY) == decode(model, cache, fed, GREEDY)


def test_another_sampling_drops_the_graphs(captures):
    model = random_model(dtype=torch.float32)
    cache = model.new_cache(3, 60)
    for temperature in (0.0, 1.0, 0.0):
        steps(model, cache, [0], 3, GREEDY._replace(temperature=temperature))
    assert len(captures.graphs) == 3 and len(cache.decode_steps._steps) == 1


def test_another_model_of_the_same_shape(captures):
    one, other = (random_model(dtype=torch.float32) for _ in range(2))
    other.norm.mul_(-1)
    cache = one.new_cache(2, 60)
    fed = [Fed(1, 3, 0.0)]
    drawn = []
    for model in (one, other, one):
        cache.reset()
        steps(model, cache, [1], 3)
        drawn.append(decode(model, cache, fed, GREEDY))
    assert drawn[0] == drawn[2] != drawn[1] and len(captures.graphs) == 3


def test_why_not():
    model = random_model(dtype=torch.float32)
    cache = model.new_cache(1, 8)
    assert capture_refusal(model, cache) == "a CUDA graph needs a GPU, but the model is on cpu"
    model.use_graphs = False
    assert capture_refusal(model, cache) == "model.use_graphs is False"


def test_ops_that_wait_are_named(monkeypatch):
    model = random_model(dtype=torch.float32, **MOE)
    cache = model.new_cache(1, 8)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))  # as if there were a GPU
    monkeypatch.setattr(dispatch, "device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "unavailable", lambda name: name != "reference" or None)
    waiting = "decode_attention on reference, expert_mlp on reference waits for the GPU"
    assert capture_refusal(model, cache) == waiting
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
    dispatch.choose.cache_clear()
    assert capture_refusal(model, cache) is None
    with recorded(model):
        expected = "a hook, a module or an op is the caller's own"
        assert capture_refusal(model, cache) == expected
    decode_op = dispatch.BoundOp("decode_attention", "reference")
    cache.layers = [layer._replace(decode=decode_op) for layer in cache.layers]
    assert capture_refusal(model, cache) == "decode_attention on reference waits for the GPU"
    dispatch.choose.cache_clear()


def test_graph_bytes_grow_with_rows_and_not_with_the_cache():
    config = random_model(dtype=torch.float32, **MOE).config
    one, four = (graph_bytes(config, torch.bfloat16, rows) for rows in (1, 4))
    assert four - one == 3 * (one - step_graphs.CUBLAS_BYTES)

"""On a GPU, each op's kernels can be captured in a CUDA graph and replayed, on other values too."""

from collections.abc import Callable

import pytest
import torch
from low_bit_cases import KINDS, low_bit
from routed import make_call
from scene import make_scene, make_step, rope_tables
from shapes import Chunk, Heads
from test_expert_mlp_low_bit import make_call as make_low_bit_call
from tolerance import assert_same
from torch import Tensor

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

KERNELS = ("triton", "cuda")
DTYPE = torch.bfloat16
HEADS = Heads(8, 2, 64)
# Two states of the same batch: rings of 64 that wrapped or did not, a window that ends in a tile.
STEPS = (
    Chunk("one token", (30, 5, 39), (1, 1, 1), 27, 16, 4),
    Chunk("other contexts", (0, 38, 16), (1, 1, 1), 27, 16, 4),
)
# Several splits, whose partials go through a workspace.
LONG_STEPS = (
    Chunk("one token", (600, 5, 300), (1, 1, 1), 500, 16, 32),
    Chunk("other contexts", (20, 610, 550), (1, 1, 1), 500, 16, 32),
)
CHUNKS = (
    Chunk("ragged", (40, 0, 130), (5, 30, 1), 48, 16, 4),
    Chunk("packed otherwise", (0, 70, 9), (20, 10, 6), 48, 16, 4),
)


def draw(*size: int, device: str) -> Tensor:
    return torch.randn(size, device=device).to(DTYPE)


def rows(state: int, device: str) -> dict:
    return {"x": draw(7, 1000, device=device), "weight": draw(1000, device=device), "eps": 1e-5}


def added_rows(state: int, device: str) -> dict:
    return {**rows(state, device), "residual": draw(7, 1000, device=device)}


def gate_up(state: int, device: str) -> dict:
    return {"gate_up": draw(7, 2 * 520, device=device)}


def product(state: int, device: str) -> dict:
    operands = {"x": draw(5, 200, device=device), "weight": draw(70, 200, device=device)}
    return {**operands, "batch_invariant": True}


def rotation(state: int, device: str) -> dict:
    positions = torch.tensor([[3, -1, 0, 39], [17, 5, 20, -7]][state], dtype=torch.int32)
    heads = {name: draw(4, n, 64, device=device) for name, n in (("q", 8), ("k", 2))}
    tables = rope_tables(64, DTYPE, device)
    return {**heads, **tables, "positions": positions.to(device), "interleaved": True}


def store(state: int, device: str) -> dict:
    scene = make_scene(CHUNKS[state], heads=HEADS, dtype=DTYPE, device=device)
    for b, (context, tokens) in enumerate(zip(*scene.chunk[1:3], strict=True)):
        for position in range(context, context + tokens):
            scene.ring.place(b, position)
    _, k, v = scene.parts()
    return {"k": k, "v": v, **scene.ring.arguments(), **scene.packing()}


def prefill(state: int, device: str) -> dict:
    scene = make_scene(CHUNKS[state], heads=HEADS, dtype=DTYPE, device=device)
    call = dict(zip("qkv", scene.parts(), strict=True))
    return {**call, **scene.packing(), **scene.ring.arguments(), **scene.visibility()}


def step(state: int, device: str) -> dict:
    scene = make_step(STEPS[state], heads=HEADS, dtype=DTYPE, device=device)
    call = dict(zip("qkv", scene.parts(), strict=True)) | rope_tables(64, DTYPE, device)
    call["positions"] = scene.int32(scene.chunk.context_lens)
    return {**call, **scene.ring.arguments(), **scene.visibility()}


def long_step(state: int, device: str) -> dict:
    scene = make_step(LONG_STEPS[state], heads=HEADS, dtype=DTYPE, device=device)
    call = dict(zip("qkv", scene.parts(), strict=True))
    call["positions"] = scene.int32(scene.chunk.context_lens)
    return {**call, **scene.ring.arguments(), **scene.visibility()}


def long_step_with_workspace(state: int, device: str) -> dict:
    workspace = {"workspace": torch.zeros(1 << 20, dtype=torch.uint8, device=device)}
    return long_step(state, device) | workspace


def routing(state: int, device: str) -> dict:
    positions = torch.tensor([[3, -1, 0, 39], [-2, 5, 20, 7]][state], dtype=torch.int32)
    logits = draw(4, 8, device=device)
    return {"logits": logits, "top_k": 2, "positions": positions.to(device)}


def experts(tokens: int) -> Callable[[int, str], dict]:
    def call(state: int, device: str) -> dict:
        arguments = make_call(tokens, 256, 512, 8, 2, dtype=DTYPE, device=device)
        if state:  # one expert has all, and some slots are skipped
            arguments["expert_ids"].fill_(3)
            arguments["expert_ids"][::3, 1] = -1
        return arguments

    return call


def low_bit_product(state: int, device: str) -> dict:
    kind = KINDS["int4-g128-zeros"]
    weight = low_bit((72, 256), kind, device)._asdict()
    return {"x": draw(5, 256, device=device), **weight, **kind.how}


def low_bit_experts(state: int, device: str) -> dict:
    sizes = (4, 128, 256, 8, 2)
    arguments = make_low_bit_call(sizes, KINDS["int8-row"], DTYPE, device)
    if state:
        arguments["expert_ids"].fill_(3)
    return arguments


MANY = experts(100)
CASES = [
    ("rms_norm", rows),
    ("add_rms_norm", added_rows),
    ("rope", rotation),
    ("rope_", rotation),
    ("silu_mul", gate_up),
    ("linear", product),
    ("store_kv_", store),
    ("prefill_attention", prefill),
    ("decode_attention", step),
    ("decode_attention", long_step),
    ("decode_attention", long_step_with_workspace),
    ("route_experts", routing),
    ("expert_mlp", experts(1)),
    ("expert_mlp", experts(16)),
    ("expert_mlp", MANY),
    ("linear_low_bit", low_bit_product),
    ("expert_mlp_low_bit", low_bit_experts),
]
ON_A_GPU = [
    pytest.param(op, make, backend, marks=pytest.mark.gpu)
    for op, make in CASES
    for backend in KERNELS
    if backend in dispatch.backends(op) and (make, backend) != (MANY, "cuda")  # refused
]


def outputs(op: str, call: dict, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """What a call returned, and the arguments that it wrote, all but its workspace."""
    returned = getattr(ops, op)(**call, backend=backend)
    schema = getattr(torch.ops.mistral_kernels, op).default._schema
    written = {argument.name for argument in schema.arguments if argument.is_write}
    written = [call[name] for name in sorted(written & call.keys() - {"workspace"})]
    returned = [returned] if isinstance(returned, Tensor) else list(returned)
    return [out for out in returned if not any(out is other for other in written)], written


def copies(call: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}


def restore(call: dict, values: dict) -> None:
    """Copies values into the tensors of a call; its workspace, zeroed once, stays as it is."""
    for name, value in values.items():
        if isinstance(value, Tensor) and name != "workspace":
            call[name].copy_(value)


def assert_all_same(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert_same(one, other, f"{what}, tensor {i}")


@pytest.mark.parametrize(("op", "make", "backend"), ON_A_GPU)
def test_replays(op, make, backend, poisoned_memory):
    states = [make(state, "cuda") for state in (0, 1)]
    # Eager calls first: they also compile, which a graph cannot hold.
    expected = [sum(outputs(op, copies(state), backend), []) for state in states]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = sum(outputs(op, copies(states[0]), backend), [])
    torch.cuda.current_stream().wait_stream(stream)
    assert_all_same(aside, expected[0], "on a side stream")

    call = copies(states[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned, written = outputs(op, call, backend)
    for turn in (0, 1, 1, 0):
        restore(call, states[turn])
        for out in returned:
            out.fill_(torch.nan if out.is_floating_point() else -7)
        graph.replay()
        torch.cuda.synchronize()
        assert_all_same(returned + written, expected[turn], f"replay of state {turn}")


@pytest.mark.parametrize(("op", "make"), CASES)
def test_the_calls_are_valid_and_their_states_differ(op, make):
    results = [outputs(op, make(state, "cpu"), "auto") for state in (0, 1)]
    first, second = (returned + written for returned, written in results)
    assert first and all(a.shape == b.shape for a, b in zip(first, second, strict=True))
    assert not all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_every_op_with_kernels_is_replayed():
    served = {op for op in ops.__all__ if set(KERNELS) & set(dispatch.backends(op))}
    assert served <= {op for op, _ in CASES}

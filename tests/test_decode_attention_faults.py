"""Faults planted in the shipped csrc/cuda/decode_attention.cu fail the tests that it passes."""

import emulated_decode
import pytest
import test_decode_attention_emulated as emulated_tests
import test_decode_attention_splits_emulated as splits_tests
import torch
from emulated_decode import CELL, decode, poisoned_workspace
from emulator.host_build import CSRC, build_core, emulated_core, load, missing
from emulator.orders import ordered
from emulator.planted_faults import Fault, plant
from scene import make_step
from shapes import Chunk, Heads
from test_decode_attention_interpreted import assert_same_results, copied

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

emulated, many_splits = emulated_decode.emulated, emulated_decode.many_splits  # fixtures
SOURCE = CSRC / "cuda" / "decode_attention.cu"
SLICE = CSRC / "cuda" / "key_slice.cuh"
PARTS = CSRC / "cuda" / "softmax_parts.cuh"
MASK = "own >= first && own <= position ? scores[i] * scale : -INFINITY"
SPLIT = "(blockIdx.y + {}) % work.live"
BARRIER = "  __syncthreads();\n"
QUERIES = "  uint32_t q[kHeadDim / 16][2];"
FAULTS = [
    Fault("barrier after the queries removed", {BARRIER + QUERIES: QUERIES}),
    Fault("barrier after the weights removed", {"heads);\n" + BARRIER: "heads);\n"}, PARTS),
    Fault(
        "barrier before counting removed",
        {BARRIER + "  if (threadIdx.x == 0) {": "  if (threadIdx.x == 0) {"},
    ),
    Fault(
        "wait for keys removed",
        {
            "    wait_copies<2 * Tile::kStages - 1>();\n    __syncwarp();\n"
            "    if (puts) put_row<typename Tile::Slice>(keys": "    __syncwarp();\n"
            "    if (puts) put_row<typename Tile::Slice>(keys"
        },
    ),
    Fault("newest key off by one", {"own <= position": "own < position"}, SLICE),
    Fault("oldest key off by one", {"own >= first": "own + 1 >= first"}, SLICE),
    Fault("mask missing", {MASK: "scores[i] * scale"}, SLICE),
    Fault("hidden key not left out", {" && work.first <= work.position": ""}),
    Fault("counter not reset", {"blockIdx.x, limit)": "blockIdx.x, 0xffffffffu)"}),
    Fault(
        "order of arrival",
        {
            "int64_t{i / work.heads}": f"int64_t{{{SPLIT.format('i / work.heads')}}}",
            "int64_t{part}": f"int64_t{{{SPLIT.format('part')}}}",
        },
    ),
]


# 512 keys, four splits of 128 for each of two heads, every warp with a part of the results.
CHUNK = Chunk("four splits", (511,), (1,), None, 512, 1)
HOW = [("forward", 0), ("reverse", 0), ("shuffled", 0), *(("interleaved", i) for i in range(8))]


@pytest.fixture
def scene(many_splits):
    """A call with large values of two splits that cancel out: added in another order, they take
    other bits of the small ones with them, which float16 shows."""
    scene = make_step(CHUNK, heads=Heads(16, 2, 64), dtype=torch.float16)
    for i in range(256):
        page, row = scene.ring.place(0, i)
        scene.ring.v_cache[page, row] += 1000 if i < 128 else -1000
    return scene


def check_orders(core, scene) -> None:
    """Assert that the bits are the same in every order, twice with each workspace, whose partials
    are NaN before; keys weigh almost alike."""
    first = None
    for order, seed in HOW:
        workspace = poisoned_workspace(100_000)
        for _ in range(2):
            with ordered(core.__file__, order, seed):
                result = decode(copied(scene), scale=1e-4, workspace=workspace)
            first = first or result
            assert_same_results(result, first, f"{order} {seed}")


def test_the_bits_do_not_depend_on_the_order_of_blocks(scene):
    check_orders(emulated_core(), scene)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_notices(fault, scene, monkeypatch):
    core = load("_C", build_core(planted=plant(SOURCE, fault)))
    monkeypatch.setattr(CELL, "native_extension", lambda: core)
    with pytest.raises(AssertionError):
        check_orders(core, scene)
        how = (torch.bfloat16, "head-major", monkeypatch)
        splits_tests.test_one_split_and_many(splits_tests.MANY[2], *how)
        emulated_tests.test_what_starts_hides_may_hold_nan(20, True, None)

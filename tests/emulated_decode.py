"""decode_attention's CUDA kernel called on the host emulator, for several test files.

The op's CUDA cell runs in place of its CPU cell, so a call takes the way it takes on a GPU: checks,
refusals, the cut into splits, the launch. A test file takes the fixtures by their names:

    emulated, many_splits = emulated_decode.emulated, emulated_decode.many_splits
"""

import importlib

import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core
from scene import Scene
from test_decode_attention_interpreted import counters, fine

from mistral_kernels import ops
from mistral_kernels.kernels import decode_attention as kernel
from mistral_kernels.ops import dispatch

CELL = importlib.import_module("mistral_kernels.ops.decode_attention")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Makes backend "cpu" of the op its CUDA cell on the emulator."""
    dispatch.choose.cache_clear()
    monkeypatch.setattr(CELL, "native_extension", emulated_core)
    monkeypatch.setattr(CELL, "cuda_queue", lambda device: (0, 0))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    row = dispatch.OPS["decode_attention"]
    monkeypatch.setitem(row, "cpu", row["cuda"])
    yield
    dispatch.choose.cache_clear()


@pytest.fixture
def many_splits(monkeypatch):
    """Splits of one tile at least, up to five of a sequence."""
    cut = kernel.plan
    monkeypatch.setattr(kernel, "plan", lambda *how: fine(cut, *how))


def poisoned_workspace(size: int) -> torch.Tensor:
    """Counters of 0, and NaN where partials go: what a call reads, it must have written."""
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    counters(workspace).zero_()
    return workspace


def decode(scene: Scene, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the op on copies between guard bands; the scene's ring is written, and the workspace."""
    q, k, v = scene.parts()
    call = {"q": q, "k": k, "v": v, "positions": scene.int32(scene.chunk.context_lens)}
    call |= {"workspace": poisoned_workspace(1 << 20), **scene.ring.arguments()}
    call |= {**scene.visibility(), **how}
    written = [name for name in ("k_cache", "v_cache", "workspace") if call[name] is not None]
    with GuardBands() as guard:
        guarded = {
            name: guard(value, mutated=name in written) if torch.is_tensor(value) else value
            for name, value in call.items()
        }
        out, lse = ops.decode_attention(**guarded, backend="cpu")
        result = out.clone(), lse.clone()
        for name in written:
            call[name].copy_(guarded[name])
    assert "workspace" in how or not counters(call["workspace"]).any(), "the counters wrap to 0"
    return result

"""Whole tiny models on the Triton kernels, in Triton's interpreter, against the golden logits.

Run with TRITON_INTERPRET=1 set before the process starts: `TRITON_INTERPRET=1 pytest -m
interpreter`. Keys are cut into tiles and splits of 4, so that windows of 8 leave partials to add
up, in the one workspace of all layers and steps.
"""

import numpy as np
import pytest
import torch
from test_golden import GOLDEN, assert_golden, load, prompts_of
from tiny_models import feed_all, poison, shuffle_pages
from tolerance import assert_same
from torch import Tensor

from mistral_kernels.kernels import decode_attention as kernel
from mistral_kernels.kernels import key_splits
from mistral_kernels.model.cache import KVCache
from mistral_kernels.ops import dispatch

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    shipped = kernel.tile_config
    monkeypatch.setattr(kernel, "tile_config", lambda *how: {**shipped(*how), "BLOCK_N": 4})
    monkeypatch.setattr(key_splits, "shortest_split", lambda slots: 4)
    key_splits.plan.cache_clear()
    yield
    monkeypatch.undo()
    key_splits.plan.cache_clear()


def run(case: str, calls: int, *, workspace: bool = True) -> tuple[list[Tensor], KVCache]:
    """Logits of each sequence in the first calls of a golden schedule, and the cache they fill."""
    arrays = np.load(GOLDEN / case / "golden.npz")
    model = load(case, "native", backend="triton")
    for op, backend in model.backends.items():
        assert backend == "triton" or "triton" not in dispatch.backends(op)
    cache = model.new_cache(len(arrays["n"]), max(arrays["n"].tolist()), page_size=16)
    if not workspace:
        cache.layers = [layer._replace(workspace=None) for layer in cache.layers]
    poison(shuffle_pages(cache))
    with torch.inference_mode():
        logits = feed_all(model, cache, prompts_of(arrays), arrays["schedule"].tolist()[:calls])
    exact = {f"f64_{b}": arrays[f"f64_{b}"][: len(rows)] for b, rows in enumerate(logits)}
    assert_golden(logits, exact, "f64_", "triton")
    return logits, cache


# Chunks around the window and single tokens side by side, then steps of single tokens.
@pytest.mark.parametrize(("case", "calls"), [("dense_w8_ragged", 4), ("mixtral_w8", 4)])
def test_golden_logits_and_one_workspace(case, calls):
    logits, cache = run(case, calls)
    workspace = cache.layers[0].workspace
    assert all(layer.workspace is workspace for layer in cache.layers)
    counters = key_splits.counter_share(len(workspace))
    assert not workspace[:counters].any(), "the counters wrap to 0"
    assert workspace[counters:].any(), "no call had partials"
    if case == "dense_w8_ragged":
        for got, want in zip(logits, run(case, calls, workspace=False)[0], strict=True):
            assert_same(got, want, "logits without a workspace")


def test_a_layer_without_a_window_among_others():
    run("ministral_interleave", 4)

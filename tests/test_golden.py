"""Logits on which mistral-inference, transformers and a float64 model agree (golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import feed, feed_all, poison, shuffle_pages
from torch import Tensor

from mistral_kernels import Transformer
from mistral_kernels.ops import dispatch
from mistral_kernels.tolerance import error, fp32_limit

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
LAYOUTS = {"native": "mistral", "huggingface": "hf"}
PLACES = [("cpu", b) for b in ("reference", "cpu") if dispatch.unavailable(b) is None]
PLACES += [pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("triton", "cuda")]


def load(case: str, layout: str, device: str = "cpu", **kwargs) -> Transformer:
    return Transformer.from_folder(GOLDEN / case / LAYOUTS[layout], device=device, **kwargs)


def prompts_of(arrays) -> list[list[int]]:
    return [arrays[f"tokens{i}"].tolist() for i in range(len(arrays["n"]))]


def assert_golden(logits: list[Tensor], arrays, key: str, backend: str) -> None:
    for i, got in enumerate(logits):
        expected = torch.from_numpy(arrays[f"{key}{i}"])
        assert got.dtype == torch.float32
        assert error(got, expected).within(fp32_limit(backend)), (i, error(got, expected))


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_schedule_with_one_cache(case: str, layout: str, device: str, backend: str):
    arrays = np.load(GOLDEN / case / "golden.npz")
    prompts, lengths = prompts_of(arrays), arrays["n"].tolist()
    model = load(case, layout, device, backend=backend)
    page_size = 4 if device == "cpu" else 16  # a multiple of 16 for the kernels
    cache = shuffle_pages(poison(model.new_cache(len(prompts), max(lengths), page_size=page_size)))
    logits = feed_all(model, cache, prompts, arrays["schedule"].tolist())
    assert cache.lengths == lengths
    for key in [k for k in ("f64_", "hf", "mistral") if f"{k}0" in arrays]:
        assert_golden(logits, arrays, key, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_all_at_once_without_a_cache(case: str, layout: str):
    arrays = np.load(GOLDEN / case / "golden.npz")
    logits = feed(load(case, layout), None, prompts_of(arrays), arrays["n"].tolist())
    assert_golden(logits, arrays, "f64_", "reference")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_is_merged(layout: str):
    case = "dense_w8_chunked"
    arrays = np.load(GOLDEN / case / "golden.npz")
    adapted = np.load(GOLDEN / case / "golden_lora.npz")
    model = load(case, layout)
    model.load_lora(GOLDEN / case / "mistral")
    logits = feed(model, None, prompts_of(arrays), arrays["n"].tolist())
    for key in ("f64_", "mistral"):
        assert_golden(logits, adapted, key, "reference")

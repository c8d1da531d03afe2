"""The Transformer's own contract: devices, dtypes, backends, outputs, and what it refuses."""

import re

import pytest
import torch
from checkpoints import tiny_config
from tiny_models import feed, random_model, random_prompts

from mistral_kernels import Transformer
from mistral_kernels.model.weights import parameter_shapes
from mistral_kernels.ops import dispatch


@pytest.mark.parametrize("changes", [{}, {"experts": 3, "top_k": 2}, {"tied_embeddings": True}])
def test_parameters_are_those_the_checkpoints_fill(changes):
    config = tiny_config(**changes)
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == parameter_shapes(config)
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in model.parameters())


def test_number_of_parameters():
    model = random_model(experts=3, top_k=2)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    one_expert = 3 * 24 * 40  # w1, w2 and w3, of hidden * ffn_dim weights each
    assert model.num_parameters(active=True) == model.num_parameters() - 2 * one_expert


def test_last_only_gives_the_last_rows_and_zeros_for_silence():
    model = random_model(windows=(4, None))
    prompts = random_prompts([5, 0, 3])
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    every = model.forward(ids, [5, 0, 3])
    last = model.forward(ids, [5, 0, 3], last_only=True)
    assert last.shape == (3, model.config.vocab)
    torch.testing.assert_close(last[[0, 2]], every[[4, 7]])
    assert last[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_float32_or_float64(dtype):
    model = random_model(windows=(4, None), dtype=dtype)
    cache = model.new_cache(1, 12)
    exact = random_model(windows=(4, None))
    prompts = random_prompts([9])
    logits = torch.cat([feed(model, cache, prompts, [n])[0] for n in (6, 1, 2)])
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = feed(exact, None, prompts, [9])[0]
    bound = 40 * torch.finfo(dtype).eps * expected.abs().max()
    assert (logits - expected).abs().max() < bound


def test_backend_is_a_preference():
    cpu = dispatch.unavailable("cpu") is None
    model = random_model(dtype=torch.float32, backend="cpu")
    assert model.backends["rms_norm"] == ("cpu" if cpu else "reference")
    assert model.backends["prefill_attention"] in dispatch.backends("prefill_attention")
    model.set_backend("reference")
    assert set(model.backends.values()) == {"reference"}
    model.set_backend("auto")
    assert model.double().backends["rms_norm"] == "reference"  # no kernel takes float64
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .* got 'fast'"):
        model.set_backend("fast")
    assert model.backend == "auto"


def test_dense_and_mixture_name_the_ops_they_use():
    assert "silu_mul" in random_model().backends
    backends = random_model(experts=3, top_k=1).backends
    assert "expert_mlp" in backends and "silu_mul" not in backends


def test_tables_grow_with_the_longest_cache():
    model = random_model()
    model.new_cache(1, 10)
    tables = model.rope_tables(10)
    assert model.rope_tables(5) is tables and len(tables.cos) == 10
    model.new_cache(1, 20)
    assert len(model.rope_tables(1).cos) == 20


def test_a_cache_made_in_inference_mode_is_usable_outside():
    model = random_model()
    with torch.inference_mode():
        cache = model.new_cache(1, 8)
        feed(model, cache, [[1, 2, 3]], [3])
    assert feed(model, cache, [[1, 2, 3, 4]], [1])[0].isfinite().all()


def test_bits_repeat():
    model = random_model(dtype=torch.float32, experts=4, top_k=2)
    prompts = random_prompts([9, 14])
    first, second = (feed(model, model.new_cache(2, 16), prompts, [9, 14]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        (([1, 2], [2]), TypeError, "input_ids must be an int32 or int64 tensor, got list"),
        ((torch.ones(2), [2]), TypeError, "int32 or int64 tensor, got torch.float32"),
        ((torch.ones(1, 2).long(), [2]), ValueError, "must have shape (tokens,), got (1, 2)"),
        ((torch.tensor([1, 32]), [2]), ValueError, "input_ids must be in [0, 32), got 32"),
        ((torch.tensor([1, -3]), [2]), ValueError, "input_ids must be in [0, 32), got -3"),
        ((torch.tensor([1, 2]), [3]), ValueError, "sum to the 2 input_ids, got [3]"),
        ((torch.tensor([1, 2]), [3, -1]), ValueError, "seqlens must be >= 0"),
        ((torch.tensor([1, 2]), [2.7]), TypeError, "seqlens must be a list of ints, got [2.7]"),
        ((torch.tensor([1, 2]), 2), TypeError, "seqlens must be a list of ints, got 2"),
    ],
)
def test_bad_forward(arguments, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        random_model().forward(*arguments)


def test_a_cache_of_another_model_is_refused():
    model = random_model(windows=(4, None))
    others = [random_model(windows=(None, None)), random_model(windows=(4,), layers=1)]
    others.append(random_model(windows=(4, None), dtype=torch.float32))
    for other in others:
        with pytest.raises(ValueError, match="cache must come from this model's new_cache"):
            model.forward(torch.tensor([1]), [1], other.new_cache(1, 4))
    with pytest.raises(TypeError, match="cache must be a KVCache, got dict"):
        model.forward(torch.tensor([1]), [1], {})


def test_wrong_number_of_sequences_for_the_cache():
    model = random_model()
    with pytest.raises(ValueError, match="seqlens must have the cache's 2 entries, got 1"):
        model.forward(torch.tensor([1]), [1], model.new_cache(2, 4))


@pytest.mark.parametrize(
    ("kwargs", "exception", "message"),
    [
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be >= 1, got 0"),
        ({"max_batch_size": 1.5}, TypeError, "max_batch_size must be an int, got float"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"backend": "fast"}, ValueError, "backend must be 'auto' or one of"),
        ({"device": "gpu"}, ValueError, "device must be an available torch device, got 'gpu'"),
        ({"device": "fpga"}, ValueError, "device must be an available torch device, got 'fpga'"),
        ({"device": "cuda:99"}, ValueError, "device must be an available torch device, got"),
        ({"device": 1.5}, ValueError, "device must be an available torch device, got 1.5"),
    ],
)
def test_bad_construction(kwargs, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        Transformer(tiny_config(), **kwargs)

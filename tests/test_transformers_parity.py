"""The same logits and greedy tokens as transformers, on random tiny models of every family."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_models import YARN
from tiny_models import feed, feed_all, random_prompts
from transformers import (
    AutoModelForCausalLM,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
)
from transformers.utils import logging

from mistral_kernels import Transformer, generate
from mistral_kernels.tolerance import error, fp32_limit

logging.disable_progress_bar()

VOCAB = 61
FAMILIES = {
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "mistral-full": (MistralConfig, {"sliding_window": None}),
    "mixtral": (MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": (MixtralConfig, {"num_local_experts": 3, "sliding_window": 6}),
    "ministral": (
        MinistralConfig,
        {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "ministral3": (Ministral3Config, {"rope_parameters": YARN, "sliding_window": None}),
}


def make(family: str, folder, **changes):
    """A random transformers model of `family`, saved to `folder`."""
    config_class, fields = FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": family == "ministral3",
        "initializer_range": 0.2,
    }
    config = config_class(**(sizes | fields | changes))
    torch.manual_seed(0)
    # eager: the others want sizes that are multiples of 16 bytes
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **eager).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms are initialised to 1, which would hide a swapped one
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def expected_logits(model, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0]


def assert_parity(theirs, folder, lengths, schedule) -> None:
    ours = Transformer.from_folder(folder, device="cpu")
    prompts = random_prompts(lengths, VOCAB)
    whole = feed(ours, None, prompts, lengths)
    cache = ours.new_cache(len(prompts), max(lengths), page_size=4)
    pieces = feed_all(ours, cache, prompts, schedule)
    for prompt, *logits in zip(prompts, whole, pieces, strict=True):
        expected = expected_logits(theirs, prompt)
        for got in logits:
            assert error(got, expected).within(fp32_limit("reference")), error(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, tmp_path):
    theirs = make(family, tmp_path)
    schedule = [[9, 4], [1, 11], [13, 1], *[[1, 1]] * 4]
    assert_parity(theirs, tmp_path, [27, 20], schedule)


@pytest.mark.parametrize("family", ["mistral", "mixtral-window", "ministral"])
def test_greedy_tokens(family, tmp_path):
    theirs = make(family, tmp_path)
    (prompt,) = random_prompts([9], VOCAB)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
    )[0, 9:]
    ours = Transformer.from_folder(tmp_path, device="cpu")
    assert generate([prompt], ours, max_tokens=30)[0][0] == expected.tolist()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_shapes(tmp_path_factory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("drawn")
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    theirs = make(
        draw(st.sampled_from(["mistral", "mixtral"])),
        folder,
        hidden_size=draw(st.integers(1, 6)) * 8,
        intermediate_size=draw(st.integers(3, 50)),
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 8, 18, 32])),
        num_hidden_layers=draw(st.integers(1, 3)),
        sliding_window=draw(st.none() | st.integers(1, 20)),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
    )
    seqlens = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    assert_parity(theirs, folder, [sum(seqlens)], [[n] for n in seqlens])

"""`attn_implementation="mistral_kernels"` gives what eager attention gives, or says why not."""

import pytest
import torch
import transformers
from stock_models import MOE, OURS, SIZES, fed, padded, random_ids, stock, switched
from tolerance import AS_EAGER
from transformers import DynamicCache, StaticCache

from mistral_kernels.integrations.transformers import NAME, RollingCache
from mistral_kernels.integrations.transformers_attention import attention_function
from mistral_kernels.tolerance import error, low_precision_limit

CHUNKS = (9, 1, 1, 6, 1, 12)
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic, full": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "rolling": RollingCache,
    "rolling, lookahead": lambda config: RollingCache(config, lookahead=5, page_size=4),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def assert_as_eager(logits, expected, mask=None) -> None:
    rows = slice(None) if mask is None else mask.bool()
    assert error(logits[rows], expected[rows]).within(AS_EAGER), error(logits[rows], expected[rows])


@pytest.mark.parametrize("window", [None, 1, 5, 23, 64])
def test_as_eager(window):
    model = stock(sliding_window=window)
    ids, left = padded(random_ids(5, 30), 30, 23, 1, 30, 12).values()
    right = left.flip(1)
    # Without a cache eager reads a mask; with one, transformers' sliding layers fail for window 1.
    expected = [model(ids, attention_mask=mask, use_cache=False).logits for mask in (left, right)]
    switched(model)
    for mask, logits in zip((left, right), expected, strict=True):
        for cached in (False, True):
            assert_as_eager(model(ids, attention_mask=mask, use_cache=cached).logits, logits, mask)
    for name, make in CACHES.items():
        if window == 1 and "dynamic" in name:
            with pytest.raises(ValueError, match="window of 1; use RollingCache"):
                fed(model, ids, left, make(model.config), CHUNKS)
        else:
            logits = fed(model, ids, left, make(model.config), CHUNKS)
            assert_as_eager(logits, expected[0], left)
    alone = fed(model, ids[:1], left[:1], RollingCache(model.config), (29, 1))
    assert_as_eager(alone, expected[0][:1])


WINDOW = {"sliding_window": 5}


@pytest.mark.parametrize(
    "family, fields",
    [
        ("Mixtral", WINDOW | MOE),
        (
            "Ministral",
            {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
        ),
        ("Ministral3", {"sliding_window": None}),
        ("Llama", {}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("Qwen3", {}),
        # These two tell the window to their mask alone.
        (
            "Qwen2Moe",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
            | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ),
        ("Phimoe", {"sliding_window": 5, "num_local_experts": 4}),
    ],
)
def test_families(family, fields, tmp_path):
    model = stock(family, **fields)
    ids, mask = padded(random_ids(2, 30), 30, 23).values()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **OURS)
    for make in CACHES.values():
        assert_as_eager(fed(model, ids, mask, make(model.config), CHUNKS), expected, mask)


def test_text_part_of_a_multimodal_model():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**SIZES, sliding_window=5),
        vision_config=transformers.PixtralVisionConfig(**vision, num_attention_heads=2),
    )
    model = transformers.Mistral3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    ids, mask = padded(random_ids(2, 30), 30, 23).values()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation({"text_config": NAME})
    assert_as_eager(fed(model, ids, mask, RollingCache(model.config), CHUNKS), expected, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    ids, mask = padded(random_ids(3, 30), 30, 23, 12).values()
    visible = mask.bool()
    exact, eager, ours = (
        stock("Mixtral", kind, sliding_window=5, num_local_experts=4, num_experts_per_tok=4)
        for kind in (torch.float64, dtype, dtype)
    )
    # As float64 has them: rounding must not be told apart from rounded weights.
    exact.load_state_dict({k: v.double() for k, v in eager.state_dict().items()})
    call = {"attention_mask": mask, "use_cache": False}
    logits, theirs = (m(ids, **call).logits[visible] for m in (exact, eager))
    found = fed(switched(ours), ids, mask, RollingCache(ours.config), CHUNKS)[visible]
    limit = low_precision_limit(error(theirs, logits))
    assert error(found, logits).within(limit), (error(found, logits), limit)


def test_packed_sequences():
    model = stock(sliding_window=5)
    ids = random_ids(2, 24)
    places = torch.cat([torch.arange(n) for n in (9, 1, 14)])[None]
    call = {"position_ids": places, "use_cache": False}
    expected = model(ids, **call).logits
    assert_as_eager(switched(model)(ids, **call).logits, expected)
    assert_as_eager(model(ids[:, :9], use_cache=False).logits, expected[:, :9])


def test_refusals():
    model = switched(stock(sliding_window=5))
    ids = random_ids(2, 6)
    hole = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="hide tokens between visible ones.*pad on the left"):
        model(ids, attention_mask=hole)
    with pytest.raises(ValueError, match="mask of your own"):
        model(ids, attention_mask=torch.zeros(2, 1, 6, 6))
    cache = RollingCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="must cover the 6 tokens in the cache and the 1 new"):
        model(ids[:, :1], attention_mask=hole[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="output_attentions.*eager"):
        model(ids, output_attentions=True)
    full = switched(stock("Llama"))
    for other, kept in (model, cache), (full, StaticCache(config=full.config, max_cache_len=9)):
        with torch.enable_grad(), pytest.raises(RuntimeError, match="use_cache=False"):
            other(ids, past_key_values=kept)
    chunked = stock("Llama")
    chunked.config.is_causal = False
    with pytest.raises(ValueError, match="bidirectional"):
        switched(chunked)(ids)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dropout": 0.1}, "attention_dropout to 0"),
        ({"softcap": 50.0}, "soft-capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"sliding_window": 0}, "sliding_window must be >= 1"),
        ({"value": torch.zeros(1, 2, 3, 4)}, "one dtype and head_dim"),
        (
            {"key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8)},
            "5 keys for 3 queries",
        ),
    ],
)
def test_what_no_op_has_is_refused(changes, message):
    rows = {"query": 4, "key": 2, "value": 2}
    call = {name: torch.zeros(1, heads, 3, 8) for name, heads in rows.items()}
    with pytest.raises(ValueError, match=message):
        attention_function(torch.nn.Module(), **(call | {"attention_mask": None} | changes))

"""`experts_implementation="mistral_kernels"`, and training through attention and experts."""

import peft
import pytest
import torch
from stock_models import MOE, padded, random_ids, stock, switched
from tolerance import AS_EAGER, assert_close
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mistral_kernels.integrations.transformers import enable
from mistral_kernels.integrations.transformers_experts import experts_function
from mistral_kernels.tolerance import error


def layer(experts: int, dtype: torch.dtype) -> MixtralExperts:
    """Experts of a tiny Mixtral, the same weights for every dtype once rounded to bfloat16."""
    model = stock("Mixtral", torch.bfloat16, num_local_experts=experts, num_experts_per_tok=2)
    return model.model.layers[0].mlp.experts.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [4, 5, 8])
def test_as_eager(experts, dtype):
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    weights = torch.rand(7, 2)
    # The last id is the one that expert parallelism gives to experts of other processes.
    ids = torch.rand(7, experts + 1).argsort(-1)[:, :2]
    known, shares = ids.clamp(max=experts - 1), weights * (ids < experts)
    with torch.no_grad():
        exact = layer(experts, torch.float64)(x.double(), known, shares.double())
        eager = layer(experts, dtype)(x.to(dtype), known, shares.to(dtype))
        out = experts_function(layer(experts, dtype), x.to(dtype), ids, weights.to(dtype))
    assert_close(out, eager, exact, f"{experts} experts")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("is_transposed", True, "is_transposed=False, got True"),
        ("has_bias", True, "has_bias=False"),
        ("act_fn", torch.nn.GELU(), "silu"),
        ("down_proj", torch.nn.Parameter(torch.zeros(4, 48, 64)), r"\(4, 48, 64\)"),
    ],
)
def test_experts_of_another_form_are_refused(name, value, message):
    experts = layer(4, torch.float32)
    setattr(experts, name, value)
    with pytest.raises(ValueError, match=message):
        experts_function(experts, torch.zeros(1, 64), torch.zeros(1, 2), torch.zeros(1, 2))


def gradients(model: torch.nn.Module, use_cache: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of a language model's loss on a padded batch, at parameters that want one."""
    batch = padded(random_ids(3, 17), 17, 9, 1)
    # A first token's label would be asked of the padding before it.
    labels = batch["input_ids"] * batch["attention_mask"].roll(1, 1)
    labels = labels.masked_fill(labels == 0, -100)
    model.train()
    model.zero_grad()
    model(**batch, labels=labels, use_cache=use_cache).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and len(found) > 4
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-4, f"{name} has no gradient to compare"
        assert error(found[name], grad).within(AS_EAGER), (name, error(found[name], grad))


@pytest.mark.parametrize("parts", [False, True], ids=["switches", "enabled"])
def test_gradients(parts):
    model = stock("Mixtral", sliding_window=5, **MOE)
    expected = gradients(model)
    switched(model)
    if parts:
        enable(model)
    assert_same_gradients(gradients(model), expected)
    assert_same_gradients(gradients(model, use_cache=True), expected)  # of an empty DynamicCache
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(model), expected)


def test_lora_on_fused_experts():
    model = stock("Mixtral", sliding_window=5, **MOE)
    lora = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(model, lora)
    expected = gradients(model)
    assert all("lora" in name for name in expected)
    switched(model.base_model.model)
    enable(model)
    assert_same_gradients(gradients(model), expected)

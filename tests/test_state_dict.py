"""state_dict and load_state_dict in native names, within the contract of nn.Module."""

import copy
import pickle
import re

import checkpoints
import pytest
import torch
from tiny_models import feed, random_model
from torch import nn

from mistral_kernels import Transformer

WQ, W2 = "layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight"
CASES = {
    "dense": {},
    "moe": {"experts": 3, "top_k": 2},
    "tied": {"tied_embeddings": True},
    "huggingface": {"interleaved": False},
}


def empty_model(**changes) -> Transformer:
    model = Transformer(checkpoints.tiny_config(**changes), dtype=torch.float64)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    return model


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_keys_shapes_and_rows_are_those_of_a_native_checkpoint(changes, tmp_path):
    tensors = checkpoints.native_tensors(checkpoints.tiny_config(**changes))
    if "interleaved" in changes:
        config = checkpoints.tiny_config()
        checkpoints.write_huggingface(tmp_path, config)
    else:
        checkpoints.write_native(tmp_path, checkpoints.tiny_config(**changes), tensors)
    state = Transformer.from_folder(tmp_path, device="cpu").state_dict()
    assert state.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("assign", [False, True])
def test_round_trip(changes, assign):
    model, loaded = random_model(**changes), empty_model(**changes)
    result = loaded.load_state_dict(model.state_dict(), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_weights(loaded, model)


def test_tensors_are_views_of_the_models_memory():
    model = random_model(experts=3, top_k=2)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {t.untyped_storage().data_ptr() for t in model.state_dict().values()} == storages
    model.state_dict()["layers.1.feed_forward.experts.2.w3.weight"].zero_()
    assert model.layers[1].feed_forward.w13[2, 40:].eq(0).all()
    assert model.layers[1].feed_forward.w13[2, :40].ne(0).all()


def test_prefix_destination_and_keep_vars():
    model = random_model()
    destination = {"other": 1}
    state = model.state_dict(destination=destination, prefix="lm.", keep_vars=True)
    assert state is destination and state.pop("other") == 1
    assert set(state) == {f"lm.{key}" for key in model.state_dict()}
    assert state["lm.norm.weight"] is model.norm
    assert state["lm.layers.0.attention.wo.weight"] is model.layers[0].attention.wo


class Wrapper(nn.Module):
    def __init__(self, model: Transformer):
        super().__init__()
        self.lm, self.head = model, nn.Linear(3, 2)


@pytest.mark.parametrize("assign", [False, True])
def test_inside_another_module(assign):
    wrapped, loaded = Wrapper(random_model()), Wrapper(empty_model())
    state = wrapped.state_dict()
    assert f"lm.{WQ}" in state and "head.bias" in state
    loaded.load_state_dict(state, assign=assign)
    assert_same_weights(loaded, wrapped)
    state[f"lm.{WQ[:-6]}bias"] = state.pop(f"lm.{WQ}")
    with pytest.raises(RuntimeError, match=rf"(?s)Missing.*lm\.{WQ}.*Unexpected.*wq\.bias"):
        loaded.load_state_dict(state)


def test_values_are_converted_or_with_assign_taken_as_they_are():
    state = {key: t.to(torch.bfloat16) for key, t in random_model().state_dict().items()}
    model = empty_model()
    model.load_state_dict(state)
    assert model.dtype == torch.float64
    assert torch.equal(model.state_dict()[WQ], state[WQ].double())
    model.load_state_dict(state, assign=True)
    assert model.dtype == torch.bfloat16 and torch.equal(model.state_dict()[WQ], state[WQ])
    assert model.rope_tables(4).cos.dtype == torch.float32
    assert feed(model, None, [[1, 2, 3]], [3])[0].isfinite().all()


def test_a_model_without_memory_is_filled_by_assign():
    source = random_model(dtype=torch.float32, backend="reference")
    model = Transformer(source.config, device="meta", backend="reference")
    with pytest.raises(RuntimeError, match="the meta device"):
        model.load_state_dict(source.state_dict())
    model.load_state_dict(source.state_dict(), assign=True)
    assert model.device.type == "cpu" and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(feed(model, None, [[1, 2]], [2])[0], feed(source, None, [[1, 2]], [2])[0])


def test_not_strict():
    state = random_model().state_dict()
    model, before = random_model(), state[W2].clone()
    given = {WQ: torch.ones_like(state[WQ]), "lora.a": 1, "layers.0.attention.wqkv": state[WQ]}
    result = model.load_state_dict(given, strict=False)
    assert set(result.missing_keys) == state.keys() - {WQ}
    assert set(result.unexpected_keys) == {"lora.a", "layers.0.attention.wqkv"}
    after = model.state_dict()
    assert after[WQ].eq(1).all() and torch.equal(after[W2], before)
    assert torch.equal(after["layers.0.attention.wk.weight"], state["layers.0.attention.wk.weight"])


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({WQ: None}, {}, f'Missing key(s) in state_dict: "{WQ}"'),
        ({"a": torch.ones(1)}, {}, 'Unexpected key(s) in state_dict: "a"'),
        ({WQ: None, W2: torch.ones(2)}, {}, f"size mismatch for {W2}"),
        ({W2: torch.ones(2)}, {"strict": False}, "shape torch.Size([2]) from checkpoint"),
        ({W2: [1.0]}, {}, f"{W2}: expected a tensor, got list"),
        ({W2: torch.empty(24, 40, device="meta")}, {}, "the meta device"),
        ({WQ: None}, {"strict": False, "assign": True}, f"{WQ} is not given"),
        ({W2: torch.ones(24, 40)}, {"assign": True}, "got torch.float32 on cpu, torch.float64"),
    ],
)
def test_an_error_changes_nothing(changes, arguments, message):
    state = empty_model().state_dict() | changes
    state = {key: value for key, value in state.items() if value is not None}
    model = random_model()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model.load_state_dict(state, **arguments)
    assert_same_weights(model, random_model())


def test_state_of_no_mapping():
    with pytest.raises(TypeError, match="dict-like"):
        random_model().load_state_dict([1])


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_the_module_is_copied_and_moved_as_before(twin):
    model = random_model(experts=3, top_k=2)
    other = twin(model)
    assert_same_weights(other, model)
    other.half()
    assert other.state_dict()[W2.replace("w2", "experts.0.w2")].dtype == torch.float16
    assert model.dtype == torch.float64

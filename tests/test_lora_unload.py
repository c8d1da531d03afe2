"""Several adapters in one model: their weighted sum is rounded once, and each can be taken out."""

from pathlib import Path

import pytest
import torch
from checkpoints import native_tensors, parameters_of, tiny_config
from safetensors.torch import save_file
from test_lora import adapter_for, merged_in_float64
from tiny_models import random_model, random_prompts
from torch import Tensor

from mistral_kernels import Transformer

SHAPES = {"dense": {}, "moe": {"experts": 3, "top_k": 2}}


def write_adapter(
    folder: Path, name: str, *, kinds: tuple[str, ...] = (), **shape: int
) -> dict[str, Tensor]:
    """Writes a random native adapter of some kinds of matrices (none: all); returns its tensors."""
    torch.manual_seed(sum(map(ord, name)))
    adapter = adapter_for(native_tensors(tiny_config(**shape)))
    if kinds:
        adapter = {key: t for key, t in adapter.items() if key.split(".lora")[0].endswith(kinds)}
    (folder / name).mkdir()
    save_file(adapter, folder / name / "lora.safetensors")
    return adapter


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


def assert_equal(model: Transformer, expected: dict[str, Tensor]) -> None:
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> dict[str, int]:
    return SHAPES[request.param]


def test_weighted_sum_is_rounded_once(tmp_path: Path, shape: dict[str, int]) -> None:
    config, dtype = tiny_config(**shape), torch.bfloat16
    tensors = native_tensors(config, dtype=dtype)
    model = random_model(dtype=dtype, **shape)
    factors = {"a": (2.0, 1.0), "b": (0.7, -0.4), "c": (1.5, 0.3)}
    merged = tensors
    for name, (scaling, weight) in factors.items():
        adapter = write_adapter(tmp_path, name, **shape)
        merged = merged_in_float64(merged, adapter, scaling * weight)
        model.load_lora(tmp_path / name, None if scaling == 2.0 else scaling, weight=weight)
    exact = parameters_of(merged, config)
    for name, tensor in model.named_parameters():
        # Half a unit in the last place of bfloat16, and the float32 sum's own error; rounding
        # after each of three adapters misses this by far, see below.
        torch.testing.assert_close(tensor.double(), exact[name].double(), rtol=2**-8, atol=1e-6)
    one_by_one = random_model(dtype=dtype, **shape)
    for name, (scaling, weight) in factors.items():
        one_by_one.load_lora(tmp_path / name, scaling, weight=weight, keep_base=False)
    wqkv = one_by_one.layers[0].attention.wqkv
    error = (wqkv.double() - exact["layers.0.attention.wqkv"]).abs()
    assert (error > 2**-8 * exact["layers.0.attention.wqkv"].abs() + 1e-6).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_unloading_is_exact(tmp_path: Path, shape: dict[str, int], dtype: torch.dtype) -> None:
    kinds = {"a": ("wq", "wk"), "b": ("wq", "w1", "w2"), "c": ("wo", "w2")}
    for name in kinds:
        write_adapter(tmp_path, name, kinds=kinds[name], **shape)
    base = weights_of(random_model(dtype=dtype, **shape))
    model = random_model(dtype=dtype, **shape)
    for name in kinds:
        model.load_lora(tmp_path / name)
    model.unload_lora(tmp_path / "b")
    others = random_model(dtype=dtype, **shape)
    others.load_lora(tmp_path / "a")
    others.load_lora(tmp_path / "c" / "lora.safetensors")
    assert_equal(model, weights_of(others))
    model.load_lora(tmp_path / "b")
    model.unload_lora()
    assert_equal(model, base)
    model.unload_lora()  # none is left: nothing to do
    others.unload_lora(tmp_path / "c")
    others.unload_lora(tmp_path / "a")
    assert_equal(others, base)


def test_logits_follow(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a")
    model = random_model()
    ids = torch.tensor(random_prompts([9])[0])
    before = model(ids, [9])
    model.load_lora(tmp_path / "a")
    adapted = model(ids, [9])
    assert (adapted - before).abs().max() > 0.1
    model.set_backend("reference")
    torch.testing.assert_close(model(ids, [9]), adapted)
    model.unload_lora()
    model.set_backend("auto")
    assert torch.equal(model(ids, [9]), before)


def test_copies_follow_the_dtype(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a")
    write_adapter(tmp_path, "b")
    model, expected = random_model(dtype=torch.float32), random_model(dtype=torch.float32)
    model.load_lora(tmp_path / "a")
    model.load_lora(tmp_path / "b")
    model.to(torch.bfloat16)
    model.unload_lora(tmp_path / "a")
    expected.to(torch.bfloat16).load_lora(tmp_path / "b")
    assert_equal(model, weights_of(expected))
    model.to(torch.float32).unload_lora()
    assert_equal(model, weights_of(random_model(dtype=torch.bfloat16).to(torch.float32)))


def test_new_weights_hold_no_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a")
    write_adapter(tmp_path, "b")
    model = random_model()
    base = {name: tensor + 1 for name, tensor in weights_of(model).items()}
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_lora(tmp_path / "a")
    model.load_lora(tmp_path / "b", keep_base=False)
    model.load_state_dict(state)
    model.unload_lora()
    assert_equal(model, base)
    model.load_lora(tmp_path / "a")
    model.unload_lora(tmp_path / "a")
    assert_equal(model, base)


@pytest.mark.parametrize(
    ("change", "strict", "message"),
    [
        ({"norm.weight": torch.ones(3)}, True, "size mismatch for norm.weight"),
        ({"norm.weight": None}, False, r"lora.safetensors is merged: unload_lora\(\) first"),
    ],
)
def test_weights_that_are_refused_leave_the_adapter(
    tmp_path: Path, change: dict[str, Tensor | None], strict: bool, message: str
) -> None:
    write_adapter(tmp_path, "a")
    model = random_model()
    base = weights_of(model)
    state = {key: torch.ones_like(tensor) for key, tensor in model.state_dict().items()} | change
    model.load_lora(tmp_path / "a")
    merged = weights_of(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({k: t for k, t in state.items() if t is not None}, strict=strict)
    assert_equal(model, merged)
    model.unload_lora(tmp_path / "a")
    assert_equal(model, base)


def test_merging_for_good(tmp_path: Path) -> None:
    for name in "abc":
        write_adapter(tmp_path, name)
    model, kept = random_model(dtype=torch.bfloat16), random_model(dtype=torch.bfloat16)
    model.load_lora(tmp_path / "a")
    model.load_lora(tmp_path / "b", keep_base=False)  # with what is loaded: one sum of both
    kept.load_lora(tmp_path / "a")
    kept.load_lora(tmp_path / "b")
    assert_equal(model, weights_of(kept))
    merged = weights_of(model)
    for path in (None, tmp_path / "a", tmp_path / "b"):
        with pytest.raises(ValueError, match="merged for good"):
            model.unload_lora(path)
    with pytest.raises(ValueError, match="already loaded"):
        model.load_lora(tmp_path / "a")
    model.load_lora(tmp_path / "c")
    model.unload_lora(tmp_path / "c")
    assert_equal(model, merged)


def test_wrong_names_change_nothing(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a")
    write_adapter(tmp_path, "b")
    model = random_model()
    with pytest.raises(ValueError, match="a: not loaded; loaded are: none"):
        model.unload_lora(tmp_path / "a")
    model.load_lora(tmp_path / "a")
    before = weights_of(model)
    with pytest.raises(ValueError, match="already loaded"):
        model.load_lora(tmp_path / "b" / ".." / "a" / "lora.safetensors", weight=2.0)
    with pytest.raises(ValueError, match=r"b: not loaded; loaded are: .*a.lora\.safetensors"):
        model.unload_lora(tmp_path / "b")
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight: expected a finite number"):
            model.load_lora(tmp_path / "b", weight=weight)
    with pytest.raises(TypeError, match="weight: expected a number, got str"):
        model.load_lora(tmp_path / "b", weight="1")
    assert_equal(model, before)


def test_file_is_not_needed_again(tmp_path: Path) -> None:
    for name in "ab":
        write_adapter(tmp_path, name)
    model, expected = random_model(), random_model()
    model.load_lora(tmp_path / "a")
    model.load_lora(tmp_path / "b")
    expected.load_lora(tmp_path / "a")
    for name in "ab":
        (tmp_path / name / "lora.safetensors").write_bytes(b"")
    model.unload_lora(tmp_path / "b")
    assert_equal(model, weights_of(expected))


@pytest.mark.parametrize("failing_call", [0, 5, 13])
def test_failure_half_way_puts_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    for name in "ab":
        write_adapter(tmp_path, name)
    model = random_model(dtype=torch.bfloat16)
    model.load_lora(tmp_path / "a")
    before = weights_of(model)
    calls = iter(range(100))
    original = Tensor.addmm_

    def out_of_memory(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        if next(calls) == failing_call:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "addmm_", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model.load_lora(tmp_path / "b")
    monkeypatch.undo()
    assert_equal(model, before)
    model.unload_lora()
    assert_equal(model, weights_of(random_model(dtype=torch.bfloat16)))

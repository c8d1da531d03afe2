"""`enable` swaps parts of a model for our ops, and `disable` puts them back."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from stock_models import MOE, YARN, fed, padded, random_ids, stock, switched
from tolerance import AS_EAGER, assert_same
from torch.nn import functional

from mistral_kernels.integrations.transformers import RollingCache, disable, enable
from mistral_kernels.tolerance import error, low_precision_limit

FAMILIES = {
    "Mistral": {"sliding_window": 5},
    "Mixtral": {"sliding_window": 5} | MOE,
    "Ministral": {
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Ministral3": {"rope_parameters": YARN, "sliding_window": None},
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
}
HALF_ROTATED = {
    "rope_type": "linear",
    "factor": 2.0,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_as_eager_and_back(family):
    model = stock(family, **FAMILIES[family])
    ids, mask = padded(random_ids(2, 20), 20, 13).values()
    visible = mask.bool()
    call = {"attention_mask": mask, "use_cache": False}
    expected = model(ids, **call).logits
    enable(model)
    attention_only = model(ids, **call).logits[visible]
    assert error(attention_only, expected[visible]).within(AS_EAGER)
    switched(model)
    for way in (model, copy.deepcopy(model)):
        logits = fed(way, ids, mask, RollingCache(model.config), (8, 1, 11))[visible]
        assert error(logits, expected[visible]).within(AS_EAGER), error(logits, expected[visible])
    disable(model)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    assert_same(model(ids, **call).logits, expected, family)


def test_what_is_swapped():
    model = stock("Mixtral", **MOE)
    first = "model.layers.0"
    swapped = enable(model)
    assert swapped[f"{first}.input_layernorm"] == "rms_norm"
    assert swapped["model.rotary_emb"] == swapped[f"{first}.self_attn"] == "rope"
    assert swapped[f"{first}.mlp.gate"] == "route_experts"
    assert swapped[f"{first}.self_attn.q_proj"] == swapped["lm_head"] == "linear"
    assert enable(model) == swapped
    assert sorted(disable(model)) == sorted(swapped) and disable(model) == []
    assert all("forward" not in vars(module) for module in model.modules())
    assert enable(stock("Mistral"))[f"{first}.mlp"] == "silu_mul"
    turned = stock(rope_parameters=HALF_ROTATED)
    enable(turned)
    with pytest.raises(ValueError, match="must turn all 16 columns of a head, got 8"):
        turned(random_ids(1, 3))
    with pytest.raises(ValueError, match="must hold parts of .*mistral.*got ReLU"):
        enable(torch.nn.ReLU())


def test_bfloat16():
    ids, mask = padded(random_ids(2, 30), 30, 23).values()
    visible, call = mask.bool(), {"attention_mask": mask, "use_cache": False}
    exact, theirs = (stock("Mistral", dtype) for dtype in (torch.float64, torch.bfloat16))
    exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    logits, eager = (model(ids, **call).logits[visible] for model in (exact, theirs))
    enable(switched(theirs))
    found = theirs(ids, **call).logits[visible]
    limit = low_precision_limit(error(eager, logits))
    assert error(found, logits).within(limit), (error(found, logits), limit)


def test_saved_and_autocast(tmp_path):
    model = stock("Mistral")
    ids = random_ids(2, 12)
    expected = model(ids).logits
    enable(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(again(ids).logits, expected, "saved and loaded")
    with torch.autocast("cpu", torch.bfloat16):
        peer, ours = again(ids).logits, switched(model)(ids).logits
    assert error(ours, expected).within(low_precision_limit(error(peer, expected)))


def test_hooks_of_accelerate_stay():
    model = stock("Mistral")
    ids, seen = random_ids(1, 5), []

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    expected = model(ids).logits
    add_hook_to_module(model.model.norm, Watch())
    assert enable(model)["model.norm"] == "rms_norm"
    assert error(model(ids).logits, expected).within(AS_EAGER)
    assert seen == ["MistralRMSNorm"]
    disable(model)
    assert_same(model(ids).logits, expected, "put back")
    assert len(seen) == 2
    norm = model.model.norm
    remove_hook_from_module(norm)
    enable(model)
    add_hook_to_module(norm, Watch())  # it moves our forward
    disable(model)
    assert_same(model(ids).logits, expected, "put back below a later hook")
    assert len(seen) == 3
    enable(model)
    remove_hook_from_module(norm)  # and moves it back
    disable(model)
    assert "forward" not in vars(norm)


class Doubled(torch.Tensor):
    """A weight whose memory is not what it stands for, as quantised ones are."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), others=None):
        out = super().__torch_function__(function, types, arguments, others or {})
        return (2 * out).as_subclass(torch.Tensor) if function is functional.linear else out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_a_kernel_would_misread():
    model = stock("Mistral")
    attention, ids = model.model.layers[0].self_attn, random_ids(1, 5)
    transposed = attention.k_proj.weight.t().contiguous().t()
    attention.k_proj.weight = torch.nn.Parameter(transposed)
    weight = attention.v_proj.weight.detach().as_subclass(Doubled)
    attention.v_proj.weight = torch.nn.Parameter(weight)
    attention.q_proj.forward = lambda x: 3 * functional.linear(x, attention.q_proj.weight)
    expected = model(ids).logits
    assert "model.layers.0.self_attn.q_proj" not in enable(model)
    assert error(model(ids).logits, expected).within(AS_EAGER)
    x = torch.randn(2, 3, 64)
    traced = torch.jit.trace(model.model.norm, (x[0],), check_trace=False)
    assert_same(traced(x[1]), model.model.norm(x[1]), "traced")


def test_without_transformers_the_import_says_how_to_get_it():
    code = "import sys; sys.modules['transformers'] = None\n"
    code += "import mistral_kernels.integrations.transformers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'mistral_kernels[hf]'" in run.stderr.splitlines()[-1]

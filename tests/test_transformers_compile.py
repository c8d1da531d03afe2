"""torch.compile and torch.export of models on our ops: one graph, compiled once, no copies."""

import re
from unittest import mock

import pytest
import torch
from stock_models import MOE, padded, random_ids, stock, switched
from tolerance import AS_EAGER
from torch._dynamo.testing import CompileCounter
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from transformers import DynamicCache, StaticCache

from mistral_kernels import ops
from mistral_kernels.integrations.transformers import RollingCache, enable
from mistral_kernels.tolerance import error

WINDOW = 8
FULL_GRAPH = {"fullgraph": True}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def test_decode_steps_share_one_graph():
    model = stock("Mixtral", sliding_window=WINDOW, num_hidden_layers=1, **MOE)
    batch = padded(random_ids(2, 4 * WINDOW), 4 * WINDOW, 30)
    ids, mask = batch.values()
    expected = model(**batch, use_cache=False).logits
    enable(switched(model))
    cache = RollingCache(model.config)
    model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    counter = CompileCounter()
    step = torch.compile(model.forward, backend=counter, **FULL_GRAPH)
    # A mask of one size: transformers' own preparation of it depends on nothing else.
    for i in range(6, 4 * WINDOW):
        logits = step(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits[:, 0]
        assert error(logits, expected[:, i]).within(AS_EAGER), i
    assert counter.frame_count == 1
    assert cache.get_seq_length() == 4 * WINDOW  # asked of the device
    cache.crop(-1)
    logits = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, 0]
    assert error(logits, expected[:, -1]).within(AS_EAGER)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, 20)])
def test_caches_of_transformers(make):
    model = stock(sliding_window=WINDOW, num_hidden_layers=1)
    ids = random_ids(2, 10)
    expected = model(ids, use_cache=False).logits
    enable(switched(model))
    cache = make(config=model.config)
    model(ids[:, :7], past_key_values=cache)
    step = torch.compile(model.forward, backend="eager", **FULL_GRAPH)
    for i in range(7, 10):  # over the window's edge
        logits = step(ids[:, i : i + 1], past_key_values=cache).logits[:, 0]
        assert error(logits, expected[:, i]).within(AS_EAGER), i


def test_no_copy_of_the_cache_in_the_generated_code():
    """The ring goes into the op as the graph got it. C++ around it is not built here: that takes
    minutes and changes no call."""
    model = switched(stock(sliding_window=WINDOW, num_hidden_layers=1))
    ids, codes = random_ids(2, 5), []
    cache = RollingCache(model.config)
    model(ids[:, :4], past_key_values=cache)
    with (
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: None),
        torch._inductor.config.patch({"cpp.simdlen": 1, "fx_graph_cache": False}),
    ):
        torch.compile(model.forward, **FULL_GRAPH)(ids[:, 4:], past_key_values=cache)
    (code,) = codes
    (call,) = re.findall(r"= torch\.ops\.mistral_kernels\.decode_attention\.default\((.*)", code)
    without_sizes = re.sub(r"\([^()]*\)", "", re.sub(r"\([^()]*\)", "", call))
    rings = without_sizes.split(", ")[3:6]  # k_cache, v_cache, block_table
    assert all(re.fullmatch(r"arg\d+_1", name) for name in rings), call
    assert "clone" not in "".join(line for line in code.splitlines() if rings[0] in line)


def test_forward_of_any_length():
    model = stock(sliding_window=5, num_hidden_layers=1)
    lengths = (9, 13, 24)
    batches = [random_ids(2, n) for n in lengths]
    expected = [model(ids, use_cache=False).logits for ids in batches]
    counter = CompileCounter()
    forward = torch.compile(switched(model).forward, backend=counter, dynamic=True, **FULL_GRAPH)
    for ids, logits in zip(batches, expected, strict=True):
        assert error(forward(ids, use_cache=False).logits, logits).within(AS_EAGER)
    assert counter.frame_count == 1


def test_what_a_graph_cannot_do_is_refused():
    model = switched(stock("Llama", num_hidden_layers=1))
    ids = random_ids(1, 6)
    step = torch.compile(model.forward, backend="eager", **FULL_GRAPH)
    cache = RollingCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="make the cache with max_tokens"):
        step(ids[:, :1], past_key_values=cache)
    torch.compiler.reset()
    cache = RollingCache(model.config, max_tokens=7)
    model(ids, past_key_values=cache)
    step(ids[:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="max_tokens=7 and is full"):
        step(ids[:, :1], past_key_values=cache)
    hole = torch.tensor([[1, 0, 1, 1]])
    with pytest.raises(RuntimeError, match="hide tokens between visible ones"):
        torch.compile(model.forward, backend="eager")(ids[:, :4], attention_mask=hole)


def test_export_of_the_ops():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, cu_seqlens, w13, w2, logits):
            out, _ = ops.prefill_attention(q, k, v, cu_seqlens, window=4)
            x = out.flatten(1)
            weights, expert_ids = ops.route_experts(logits, 2)
            return ops.expert_mlp(
                ops.rms_norm(x, w2[0].sum(-1), 1e-5), w13, w2, weights, expert_ids
            )

    def inputs(tokens: int) -> tuple:
        q, k, v = (torch.randn(tokens, heads, 8) for heads in (4, 2, 2))
        offsets = torch.tensor([0, 3, tokens], dtype=torch.int32)
        weights = torch.randn(3, 20, 32), torch.randn(3, 32, 10)
        return q, k, v, offsets, *weights, torch.randn(tokens, 3)

    tokens = torch.export.Dim("tokens", min=2)
    dynamic = [{0: tokens} if i in (0, 1, 2, 6) else None for i in range(7)]
    exported = torch.export.export(Layer(), inputs(9), dynamic_shapes=dynamic)
    call = inputs(23)
    assert exported.module()(*call).equal(Layer()(*call))
    targets = {str(node.target) for node in exported.graph.nodes}
    names = ("prefill_attention", "route_experts", "rms_norm", "expert_mlp")
    assert {f"mistral_kernels.{name}.default" for name in names} <= targets

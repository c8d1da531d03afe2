"""On a GPU, an op's kernels can be captured in a CUDA graph and replayed with the same bits."""

import pytest
import torch
from routed import make_call
from tolerance import assert_same

from mistral_kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_add_rms_norm(backend):
    x, residual = torch.randn(2, 7, 1000, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1000, device="cuda", dtype=torch.bfloat16)

    def call():
        return ops.add_rms_norm(x, residual, weight, 1e-5, backend=backend)

    expected = [out.clone() for out in call()]  # also compiles, which a graph cannot hold
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_a_side_stream = call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    for out in replayed:
        out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for name, *outs in zip(("normed", "summed"), on_a_side_stream, replayed, strict=True):
        want = expected[("normed", "summed").index(name)]
        for out in outs:
            assert_same(out, want, name)


@pytest.mark.parametrize(
    ("tokens", "backend"), [(1, "triton"), (100, "triton"), (1, "cuda"), (16, "cuda")]
)
def test_expert_mlp(tokens, backend):
    arguments = make_call(tokens, 256, 512, 8, 2, dtype=torch.bfloat16, device="cuda")

    def call():
        return ops.expert_mlp(**arguments, backend=backend)

    expected = call().clone()  # also compiles, which a graph cannot hold
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    # The graph reads the routing of its replay, not that of its capture.
    arguments["expert_ids"].fill_(-1)
    graph.replay()
    assert (replayed == 0).all()
    arguments["expert_ids"].fill_(3)
    graph.replay()
    assert_same(replayed, call(), "all tokens to one expert, in both slots")
    assert not replayed.equal(expected)

"""transformers' generate() with its defaults, and the same model switched to our kernels.

Both share one set of weights. "switches": attn_implementation and experts_implementation alone,
with transformers' own cache; ours has `enable` and a `RollingCache` too. Times are those of a new
token, with its share of generate()'s own work and of a prompt: of 16 tokens, on a GPU of 512.
Greedy tokens are compared in float32; in bfloat16 two near logits may change places.
"""

import copy

import pytest
import torch

from benchmarks.bench_model import GPU_SIZES, SIZES, TINY, Shape, random_model, work_of
from benchmarks.peers import peers_of
from benchmarks.timing import OURS

OP = "transformers"
PEER = "transformers"
PROMPT, GPU_PROMPT = 16, 512
STEPS = 48  # new tokens of a timed call
ROUNDS = 5

SHAPES = {
    "tiny": {name: Shape(PROMPT, 1, *size) for name, size in TINY.items()},
    "cpu": {name: Shape(PROMPT, 1, *size) for name, size in SIZES.items()},
    "cuda": {name: Shape(GPU_PROMPT, 1, *size) for name, size in GPU_SIZES.items()},
}
QUICK = ("mixtral-191m", "mistral-7b")


def test_generate(bench, device, shape, dtype):
    found, reasons = peers_of("model", device, (PEER,))
    if PEER not in found:
        pytest.skip(f"{PEER}: {reasons[PEER]}")
    from mistral_kernels.integrations.transformers import NAME, RollingCache, enable

    model = random_model(shape, dtype, device)
    theirs = found[PEER].Engine(model).model
    switches, ours = (twin(theirs) for _ in range(2))
    for switched in (switches, ours):
        switched.set_attn_implementation(NAME)
        switched.set_experts_implementation(NAME)
    enable(ours)
    prompt = torch.randint(shape.vocab, (1, shape.context), device=device)
    how = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": STEPS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def generate(model, **cache) -> torch.Tensor:
        return model.generate(prompt, **how, **cache)

    calls = {
        OURS: lambda: generate(ours, past_key_values=RollingCache(ours.config)),
        PEER: lambda: generate(theirs),
        "switches": lambda: generate(switches),
    }
    work = work_of(model, shape)
    alike = dtype == torch.float32
    bench(calls.pop(OURS), tuple, work, calls, compare=alike, rounds=ROUNDS, steps=STEPS)


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """Another model on the same parameters."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)

"""The least work of a step, against counts of its own; and random models in few bits."""

import itertools

import pytest
import torch
from checkpoints import tiny_config

from mistral_kernels.model.low_bit_weight import LowBitWeight
from mistral_kernels.model.random_weights import in_few_bits, low_bit_forms, random_model
from mistral_kernels.model.step_work import step_work

BF16 = torch.bfloat16


def attention_work(windows, context: int, tokens: int, config) -> tuple[int, int]:
    """Bytes of bfloat16 keys and values in the cache, and operations, of one sequence."""
    keys = pairs = 0
    for window in windows:
        reach = window or 10**9
        keys += sum(1 for key in range(context) if context - key <= reach)
        for query in range(context, context + tokens):
            pairs += sum(1 for key in range(query + 1) if query - reach < key)
    heads = config.head_dim * config.q_heads
    return keys * 2 * config.kv_heads * config.head_dim * 2, pairs * heads * 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("context", "tokens"), [(0, 7), (5, 1), (3, 4)])
def test_a_dense_model_reads_each_weight_once(tied, context, tokens):
    config = tiny_config(windows=(4, None), tied_embeddings=tied)
    found = step_work(config, dtype=BF16, context=context, tokens=tokens, batch=3)
    table = config.vocab * config.hidden  # of the embedding, or of the output: one matrix
    weights = config.num_parameters() - (0 if tied else table)
    read, operations = attention_work(config.windows, context, tokens, config)
    assert found.bytes == 2 * weights + 3 * read
    # Norms are counted with the matrices: an operation or two an element.
    assert found.flops == 3 * (2 * (tokens * (weights - table) + table) + operations)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_experts_are_those_that_a_batch_meets_on_average(batch):
    config = tiny_config(experts=4, top_k=2)
    routes = list(itertools.product(itertools.combinations(range(4), 2), repeat=batch))
    met = sum(len(set(itertools.chain(*route))) for route in routes) / len(routes)
    expert = 3 * config.hidden * config.ffn_dim * config.layers
    rest = config.num_parameters() - 4 * expert - config.vocab * config.hidden
    found = step_work(config, dtype=BF16, context=0, batch=batch)
    assert found.bytes == pytest.approx(2 * (rest + met * expert), abs=1)
    # Each token works on its own two, whether or not others meet them too.
    more = step_work(config, dtype=BF16, context=0, batch=2 * batch)
    assert more.flops == 2 * found.flops


def test_weights_in_few_bits_are_read_as_they_are_held():
    config = tiny_config(hidden=64, ffn_dim=96, head_dim=16)
    model = random_model(config, dtype=torch.float32, weights="int8")
    held = sum(t.nbytes for t in [*model.buffers(), *model.parameters()])
    held -= model.tok_embeddings.nbytes
    how = {"dtype": torch.float32, "context": 0}
    assert step_work(config, low_bit=model.low_bit, **how).bytes == held
    assert step_work(config, low_bit=model.low_bit, **how).flops == step_work(config, **how).flops


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_in_few_bits_a_model_is_the_same_but_for_rounding(weights, experts):
    how = {"experts": experts, "top_k": 2 if experts else 0}
    full = random_model(tiny_config(hidden=64, ffn_dim=64, head_dim=16, **how), dtype=torch.float32)
    model = in_few_bits(full, weights)
    # int4 and int8: half a step of a group that reaches four or five deviations; fp8: 3 bits.
    limit = {"int4": 0.02 * 5 / 7.5, "int8": 0.02 * 5 / 127, "fp8": 0.02 * 5 / 16}[weights]
    for name, value in full.named_parameters():
        if name in model.low_bit:
            kept = model.get_submodule(name)
            assert isinstance(kept, LowBitWeight)
            difference = (kept.tensors.dequantise(torch.float32) - value).abs().max()
            assert 0 < difference <= limit, name
        else:
            assert torch.equal(model.get_parameter(name), value)
    assert len(model.low_bit) == 4 * full.config.layers


def test_random_weights_have_their_spread():
    model = random_model(tiny_config(hidden=64), dtype=torch.float32)
    assert model.tok_embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.norm, torch.ones(64))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"ffn_dim": 320}, "ffn_dim: expected a multiple of the group size 128, got 320"),
        ({"hidden": 192}, "hidden: expected a multiple of the group size 128, got 192"),
        ({"q_heads": 10, "head_dim": 16}, "q_heads \\* head_dim: .* 128, got 160"),
    ],
)
def test_groups_that_do_not_divide_a_row_are_refused_by_the_name_of_its_size(sizes, named):
    with pytest.raises(ValueError, match=f"^int4: {named}$"):
        low_bit_forms(tiny_config(**{"hidden": 128, "ffn_dim": 256} | sizes), "int4", BF16)

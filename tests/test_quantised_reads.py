"""int8 and fp8 caches number by number: every code is read as torch widens it."""

import pytest
import torch
from ring import codes, one_token_ring

from mistral_kernels import ops

OP = "decode_attention"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
SHAPES = ((1, 256), (256, 1), (4, 64))  # kv_heads, head_dim: whole vectors, and one by one


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_code_is_widened_as_torch_does(shape, cache_dtype, backend, device):
    heads, head_dim = shape
    cache = one_token_ring(heads, head_dim, cache_dtype, device)
    page, row = cache.place(0, 0)
    values = codes(cache_dtype).to(device).view(heads, head_dim)
    cache.k_cache[page, row] = torch.zeros(heads, head_dim).to(device, cache_dtype)
    cache.v_cache[page, row] = values
    # The only key has weight 1, so its value comes out as it is.
    q = torch.ones(1, heads, head_dim, device=device)
    positions = torch.zeros(1, dtype=torch.int32, device=device)
    out, lse = ops.decode_attention(
        q, None, None, **cache.arguments(), positions=positions, backend=backend
    )
    expected = values.float()
    assert torch.equal(out[0].isnan(), expected.isnan())
    assert torch.equal(out[0].nan_to_num(), expected.nan_to_num())
    assert (lse == 0).all()

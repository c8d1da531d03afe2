"""int8 and fp8 caches number by number: every rounding case is stored as torch rounds it."""

import pytest
import torch
from ring import codes, one_token_ring
from tolerance import assert_same
from torch import Tensor

from mistral_kernels import ops

OP = "store_kv_"
QUANTISED = (torch.int8, torch.float8_e4m3fn)


def rounding_cases(dtype: torch.dtype) -> Tensor:
    """Every value of the format, all half-way points and their neighbours, and what saturates."""
    values = codes(dtype).float()
    values = values[values.isfinite()].unique()
    half_way = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    cases = [values, half_way, half_way.nextafter(infinity), half_way.nextafter(-infinity)]
    limit = values.max()
    far = torch.tensor([limit * 1.01, limit * 1.1, 1e4, 3e38, torch.inf])
    cases += [far, -far, torch.tensor([-0.0, 1e-30, -1e-30])]
    return torch.cat(cases)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch makes of it."""
    return (
        x.round().clamp(-128, 127).to(dtype)
        if dtype == torch.int8
        else x.clamp(-448, 448).to(dtype)
    )


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_every_rounding_case_is_stored_as_torch_rounds_it(heads, cache_dtype, backend, device):
    x = rounding_cases(cache_dtype).to(device).expand(1, heads, -1)
    cache = one_token_ring(heads, x.shape[-1], cache_dtype, device)
    lens = torch.tensor([0, 1], dtype=torch.int32, device=device)
    ops.store_kv_(
        x, -x, **cache.arguments(), cu_seqlens=lens, context_lens=lens[:1], backend=backend
    )
    page, row = cache.place(0, 0)
    assert_same(cache.k_cache[page, row], rounded(x[0], cache_dtype), "k")
    assert_same(cache.v_cache[page, row], rounded(-x[0], cache_dtype), "v")

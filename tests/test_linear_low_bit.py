"""linear_low_bit against a float64 loop over the codes, on every backend."""

from itertools import product

import low_bit_cases
import oracle
import pytest
import refusal
import registration
import torch
from low_bit_cases import KINDS
from tolerance import assert_close, assert_same
from torch.nn import functional

from mistral_kernels import ops
from mistral_kernels.ops.low_bit import FP8, INT4, INT8, LowBit, pack, quantise, unpack

OP = "linear_low_bit"
# (x's shape, out): no rows, decode's rows, more rows, odd sizes, leading dimensions, out 0.
CASES = [
    ((0, 128), 4),
    ((1, 128), 1),
    ((1, 256), 33),
    ((3, 384), 17),
    ((8, 128), 40),
    ((19, 256), 24),
    ((2, 3, 128), 8),
    ((70, 128), 65),
    ((3, 128), 0),
]
X, W = torch.randn(3, 64), low_bit_cases.low_bit((5, 64), KINDS["int4-g32"])
VALID = {"x": X, "qweight": W.qweight, "scales": W.scales, "bits": 4, "group_size": 32}


def exact_weight(weight: LowBit) -> torch.Tensor:
    """Return the weight in float64, group by group from the layout's words: no code of the op's."""
    codes = weight.qweight.double()
    if weight.qweight.dtype == INT4:
        words = weight.qweight.contiguous().view(torch.int32).long()
        codes = torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(-2).double() - 8
    size = codes.shape[-1] // weight.scales.shape[-1]
    exact = torch.empty_like(codes)
    for group in range(weight.scales.shape[-1]):
        part = codes[..., group * size : (group + 1) * size]
        if weight.zeros is not None:
            middle = 8 if weight.qweight.dtype == INT4 else 0
            part = part + middle - weight.zeros[..., group, None].double()
        exact[..., group * size : (group + 1) * size] = (
            part * weight.scales[..., group, None].double()
        )
    if weight.perm is None:
        return exact
    ordered = torch.empty_like(exact)
    for row, codes, perm in zip(
        *(t.flatten(0, -3) if t.dim() > 2 else t[None] for t in (ordered, exact)),
        weight.perm.view(-1, exact.shape[-1]),
        strict=True,
    ):
        row[:, perm.long()] = codes
    return ordered


# Every kind, and every shape, but not every shape of every kind; least where it takes longest.
INTERPRETED = {CASES[3]: KINDS, **{case: ("int4-g128-zeros",) for case in CASES[:3] + CASES[4:]}}
PRODUCTS = [
    pytest.param(
        *case, name, marks=() if name in INTERPRETED[case] else pytest.mark.not_interpreted
    )
    for case, name in product(CASES, KINDS)
    if case in (CASES[4], CASES[7]) or name in INTERPRETED[case]
]


@pytest.mark.parametrize(("shape", "out_dim", "name"), PRODUCTS, ids=str)
def test_linear_low_bit(shape, out_dim, name, dtype, backend, device):
    kind = KINDS[name]
    x = torch.randn(shape, device=device).to(dtype)
    weight = low_bit_cases.low_bit((out_dim, shape[-1]), kind, device)
    call = {"zeros": weight.zeros, "perm": weight.perm, **kind.how, "backend": backend}
    out = ops.linear_low_bit(x, weight.qweight, weight.scales, **call)
    assert out.dtype == dtype and out.is_contiguous()
    exact = oracle.linear(oracle.f64(x).reshape(-1, shape[-1]), exact_weight(weight).cpu().numpy())
    peer = functional.linear(x, weight.dequantise(dtype))
    assert_close(out, peer, torch.from_numpy(exact).view_as(out), OP)
    assert_same(ops.linear_low_bit(x, weight.qweight, weight.scales, **call), out, "again")


@pytest.mark.parametrize("name", ["int4-g32-act-order", "int8-row", "fp8-row", "fp8-g128"])
def test_weights_are_those_of_the_layout(name, dtype, backend, device):
    # x is rows of the unit matrix, and so out is columns of the weight, rounded once.
    weight = low_bit_cases.low_bit((24, 256), KINDS[name], device)
    x = torch.eye(256, dtype=dtype, device=device)[5::37]
    call = {"zeros": weight.zeros, "perm": weight.perm, **KINDS[name].how, "backend": backend}
    out = ops.linear_low_bit(x, weight.qweight, weight.scales, **call)
    assert_same(out + 0.0, weight.dequantise(dtype).mT[5::37] + 0.0, "columns")


def test_the_layout_dequantises_as_written():
    for kind in KINDS.values():
        weight = low_bit_cases.low_bit((2, 6, 256), kind)
        for half in (0, 1):
            part = LowBit(*(None if t is None else t[half] for t in weight))
            assert_same(part.dequantise(torch.float64), exact_weight(part), "float64")


def test_without_columns_products_are_0(dtype, backend, device):
    x, empty = torch.ones(3, 0, dtype=dtype, device=device), torch.ones(5, 0, device=device)
    for codes, bits in ((INT4, 4), (INT8, 8), (FP8, 8)):
        call = {"bits": bits, "group_size": 32, "backend": backend}
        out = ops.linear_low_bit(x, empty.to(codes), empty, **call)
        assert_same(out, torch.zeros(3, 5, dtype=dtype), str(codes))


def test_packing_is_undone():
    codes = torch.randint(0, 16, (3, 5, 40), dtype=torch.uint8)
    assert_same(unpack(pack(codes)), codes, "codes")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [INT4, INT8, FP8])
def test_rounds_to_the_nearest_code(kind, symmetric):
    if kind == FP8 and not symmetric:
        return
    weight = torch.randn(4, 64)
    low = quantise(weight, kind, 32, symmetric=symmetric)
    error = (low.dequantise(torch.float32) - weight).abs().unflatten(-1, (2, 32))
    # Half a step; e4m3 has 3 bits behind the first, and its last code is 448. The largest value of
    # a symmetric group lies up to half a step beyond the last code.
    step = weight.abs().unflatten(-1, (2, 32)) / 16 + low.scales[..., None] * 2**-10
    allowed = step if kind == FP8 else low.scales[..., None] * 0.501
    assert (error <= allowed).all()
    assert quantise(torch.zeros(2, 16), kind).dequantise(torch.float32).eq(0).all()


def test_registration(backend, device):
    for name in ("int4-g32-act-order", "int8-row"):  # torch's check cannot compare float8
        kind, x = KINDS[name], torch.randn(2, 3, 128, device=device)
        *tensors, perm = low_bit_cases.low_bit((8, 128), kind, device)
        registration.check(OP, x, *tensors, kind.bits, kind.group_size, perm, backend)


def test_refuses_autograd():
    with pytest.raises(RuntimeError, match="linear_low_bit: x requires grad"):
        ops.linear_low_bit(X.clone().requires_grad_(), W.qweight, W.scales, bits=4, group_size=32)


REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("x", torch.ones(3, 60), "multiple of 8", "in=60"),
    refusal.Case("qweight", torch.ones(5, 31).byte(), "(out, 32)", "(5, 31)"),
    refusal.Case("qweight", torch.ones(5, 64).char(), "torch.uint8", "torch.int8"),
    refusal.Case("scales", torch.ones(5, 3), "(out=5, 2)", "(5, 3)"),
    refusal.Case("scales", torch.ones(2, 5).mT, "contiguous", "(1, 5)"),
    refusal.Case("zeros", torch.ones(5, 2), "torch.uint8", "torch.float32"),
    refusal.Case("perm", torch.ones(64), "torch.int32", "torch.float32"),
    refusal.Case("perm", torch.ones(32).int(), "64", "(32,)"),
    refusal.Case("bits", 3, "4 or 8", "3"),
    refusal.Case("group_size", 48, "divide 64", "48"),
    refusal.Case("group_size", 8, "multiple of 16", "8"),
    refusal.Case("group_size", 0, ">= 1", "0"),
]


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.linear_low_bit, VALID, case)

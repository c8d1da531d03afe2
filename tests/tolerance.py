"""The one table of what an op's result may differ by; no test of an op has a tolerance of its own.

The rule is the package's (`mistral_kernels.tolerance`): a result is compared with a float64 oracle
and may be at most so much worse than plain torch doing the same maths in the result's dtype.
"""

import torch

from mistral_kernels.tolerance import MAX_FLOOR, Error, error, low_precision_limit

# Added to the low-precision rule's mean. Where torch is exact by luck (one element, one key) there
# is nothing to multiply; a tenth of the floor of the largest error is far below a rounding step of
# bf16 or fp16 (4e-3, 5e-4) and just above the float32 one (6e-8) times a short sum.
MEAN_FLOOR = MAX_FLOOR / 10

# float64 only has to show that nothing is rounded to less on the way.
FLOAT64 = Error(1e-11, 1e-12)


# float32 logits of transformers' models on our ops, against eager attention in the same dtype.
AS_EAGER = Error(2e-5, 2e-5)

# Mean error of a result that is computed in float32 and rounded once, in units of that of rounding
# the exact result. Near a half-way case float32 picks the other side now and then; a second
# rounding would add about 40 %.
ROUNDED_ONCE = 1.02


def limit(dtype: torch.dtype, peer: Error) -> Error:
    """Return the largest error allowed of a result of `dtype`, given torch's own error."""
    if dtype == torch.float64:
        return FLOAT64
    rule = low_precision_limit(peer)
    return Error(rule.max, rule.mean + MEAN_FLOOR)


def assert_close(out: torch.Tensor, peer: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Assert that `out` is about as near to `exact` as `peer` is.

    Args:
        out: the op's result.
        peer: the same maths by plain torch in the same dtype, same shape.
        exact: the float64 oracle, same shape.
        what: the name of the result, for the message.
    """
    found, allowed = error(out, exact), limit(out.dtype, error(peer, exact))
    assert found.within(allowed), f"{what}: error {found} over {allowed} in {out.dtype}"


def assert_rounded_once(out: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Assert that a bf16 or fp16 result of many elements was rounded at the end only."""
    found, best = error(out, exact).mean, error(exact.to(out.dtype), exact).mean
    assert found <= ROUNDED_ONCE * best, f"{what}: mean error {found}, of one rounding {best}"


def assert_same(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Assert that two tensors have the same dtype, shape and bits (a NaN equals a NaN)."""
    assert out.dtype == expected.dtype, f"{what}: {out.dtype} is not {expected.dtype}"
    assert out.shape == expected.shape, f"{what}: {tuple(out.shape)} is not {tuple(expected.shape)}"
    same = bits(out) == bits(expected)
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of `tensor` as integers: NaN equals itself, 0 is not -0."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(width)

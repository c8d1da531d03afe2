"""What rms_norm and its backward norm: a row, or its sum with the residual."""

import triton
import triton.language as tl


@triton.jit
def rounded_sum(x_row, residual_row, offs, mask):
    """x in fp32, or its sum with the residual (None: there is none) as that is stored, rounded."""
    value = tl.load(x_row + offs, mask=mask, other=0.0)
    if residual_row is not None:
        addend = tl.load(residual_row + offs, mask=mask, other=0.0)
        value = (value.to(tl.float32) + addend.to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)

"""rms_norm and add_rms_norm in Triton: out = value * rsqrt(mean(value^2) + eps) * weight.

`value` is x, or x + residual rounded to x's dtype, which is also written to `summed`.
A token moves 2 * hidden * itemsize bytes (x in, out out; weight stays in L2), 4 * hidden * itemsize
with a residual, for 4 to 5 * hidden operations: bound by memory at every size.
"""

import torch
import triton
import triton.language as tl

MAX_HIDDEN = 16384  # a row lives in registers: 32 fp32 values a thread at 16 warps


@triton.jit
def rms_norm_kernel(
    x_ptr,  # (tokens, hidden), last dimension contiguous
    residual_ptr,  # (tokens, hidden), last dimension contiguous; unused without HAS_RESIDUAL
    weight_ptr,  # (hidden,)
    out_ptr,  # (tokens, hidden), contiguous
    summed_ptr,  # (tokens, hidden), contiguous; unused without HAS_RESIDUAL
    hidden,  # i32
    stride_x_token,
    stride_residual_token,
    eps,  # fp32
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,  # power of two, at least hidden
):
    """Grid (tokens,). A program owns one row and reads it from memory once."""
    token = tl.program_id(0).to(tl.int64)  # token * stride may pass 2^31
    offs = tl.arange(0, BLOCK_HIDDEN)
    mask = offs < hidden

    value = tl.load(x_ptr + token * stride_x_token + offs, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + token * stride_residual_token
        addend = tl.load(residual_row + offs, mask=mask, other=0.0)
        # The sum is normed as it is stored: rounded.
        value = (value.to(tl.float32) + addend.to(tl.float32)).to(value.dtype)
        tl.store(summed_ptr + token * hidden + offs, value, mask=mask)

    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = (value * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + offs, out, mask=mask)


def tile_config(hidden: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tile and warps for rows of `hidden` elements on compute capability `arch`; not measured.

    One warp for each 512 elements: two 16-byte bf16 loads a thread in flight, four of fp32.

    Raises:
        ValueError: a row does not fit into registers.
    """
    if hidden > MAX_HIDDEN:
        raise ValueError(
            f"rms_norm: backend='triton' takes hidden up to {MAX_HIDDEN}, got {hidden}; "
            "use backend='auto'"
        )
    block_hidden = triton.next_power_of_2(hidden)
    return {"BLOCK_HIDDEN": block_hidden, "num_warps": min(max(block_hidden // 512, 1), 16)}


def work(tokens: int, hidden: int, has_residual: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    tensors, operations = (4, 5) if has_residual else (2, 4)
    return (tensors * tokens + 1) * hidden * dtype.itemsize, operations * tokens * hidden


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    summed: torch.Tensor | None,
    eps: float,
) -> None:
    """Writes `out`, and `summed` where there is a residual.

    Args:
        x: (tokens, hidden), any float dtype, last dimension contiguous.
        residual: like x, or None for plain rms_norm.
        weight: (hidden,), x's dtype.
        out: (tokens, hidden), x's dtype, contiguous.
        summed: like out; None as residual is.
        eps: added to the mean of squares.

    Raises:
        ValueError: hidden is larger than MAX_HIDDEN.
    """
    tokens, hidden = x.shape
    if tokens == 0:
        return
    # The interpreter runs CPU tensors and takes any configuration.
    arch = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rms_norm_kernel[(tokens,)](
            x,
            residual,
            weight,
            out,
            summed,
            hidden,
            x.stride(0),
            residual.stride(0) if residual is not None else 0,
            eps,
            HAS_RESIDUAL=residual is not None,
            **tile_config(hidden, x.dtype, arch),
        )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's hidden size and the largest."""
    cases = []
    for has_residual in (False, True):
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            for hidden in (4096, MAX_HIDDEN):
                config = tile_config(hidden, dtype, arch)
                shape = f"4096 tokens of 4096{', residual' if has_residual else ''}"
                headline = name == "bf16" and hidden == 4096
                pointer = f"*{name}"
                cases.append(
                    {
                        "case": f"{name} {hidden}{' add' if has_residual else ''}",
                        "kernel": rms_norm_kernel,
                        "signature": {
                            "x_ptr": pointer,
                            "residual_ptr": pointer if has_residual else "constexpr",
                            "weight_ptr": pointer,
                            "out_ptr": pointer,
                            "summed_ptr": pointer if has_residual else "constexpr",
                            "hidden": "i32",
                            "stride_x_token": "i32",
                            "stride_residual_token": "i32",
                            "eps": "fp32",
                        },
                        "constexprs": {"HAS_RESIDUAL": has_residual, **config},
                        "due": (),
                        "work": {shape: work(4096, 4096, has_residual, dtype)} if headline else {},
                    }
                )
    return cases

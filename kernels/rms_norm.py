"""rms_norm and add_rms_norm in Triton: out = value * rsqrt(mean(value^2) + eps) * weight.

`value` is x, or x + residual rounded to x's dtype, which is also written to `summed`.
A token moves 2 * hidden * itemsize bytes (x in, out out; weight stays in L2), 4 * hidden * itemsize
with a residual, for 4 to 5 * hidden operations: bound by memory at every size. A row that does not
fit into registers is read in pieces and twice, the second time from L2.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.processor import processor
from mistral_kernels.kernels.rounded_sum import rounded_sum

WHOLE_ROW = 16384  # longest that fits into registers: 32 fp32 values a thread at 16 warps
PIECE = 4096  # of a longer row; not measured


@triton.jit
def rms_norm_kernel(
    x_ptr,  # (tokens, hidden), last dimension contiguous
    residual_ptr,  # (tokens, hidden), last dimension contiguous; or None
    weight_ptr,  # (hidden,)
    out_ptr,  # (tokens, hidden), contiguous
    summed_ptr,  # (tokens, hidden), contiguous; None without a residual
    hidden,  # i32
    stride_x_token,
    stride_residual_token,
    eps,  # fp32
    WHOLE: tl.constexpr,  # BLOCK_HIDDEN holds a row, which is then read once
    BLOCK_HIDDEN: tl.constexpr,  # power of two
):
    """Grid (tokens,). A program owns one row."""
    token = tl.program_id(0).to(tl.int64)  # token * stride may pass 2^31
    x_row, residual_row = x_ptr + token * stride_x_token, residual_ptr
    if residual_ptr is not None:
        residual_row += token * stride_residual_token
    end = BLOCK_HIDDEN if WHOLE else hidden  # a loop of one step is none

    value = tl.zeros([BLOCK_HIDDEN], tl.float32)
    squares = tl.zeros([BLOCK_HIDDEN], tl.float32)
    for first in range(0, end, BLOCK_HIDDEN):
        offs = first + tl.arange(0, BLOCK_HIDDEN)
        value = rounded_sum(x_row, residual_row, offs, offs < hidden)
        squares += value * value
        if summed_ptr is not None:
            summed = value.to(summed_ptr.dtype.element_ty)
            tl.store(summed_ptr + token * hidden + offs, summed, mask=offs < hidden)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / hidden + eps)

    for first in range(0, end, BLOCK_HIDDEN):
        offs = first + tl.arange(0, BLOCK_HIDDEN)
        if not WHOLE:
            value = rounded_sum(x_row, residual_row, offs, offs < hidden)
        weight = tl.load(weight_ptr + offs, mask=offs < hidden, other=0.0).to(tl.float32)
        out = (value * scale * weight).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * hidden + offs, out, mask=offs < hidden)


def tile_config(hidden: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tile and warps for rows of `hidden` elements on compute capability `arch`; not measured.

    One warp for each 512 elements: two 16-byte bf16 loads a thread in flight, four of fp32.
    """
    block = triton.next_power_of_2(hidden) if hidden <= WHOLE_ROW else PIECE
    return {"BLOCK_HIDDEN": block, "num_warps": min(max(block // 512, 1), 16)}


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
    """
    tokens, hidden = x.shape
    if tokens == 0:
        return
    arch, _ = processor(x.device)
    config = tile_config(hidden, x.dtype, arch)
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
            WHOLE=hidden <= config["BLOCK_HIDDEN"],
            **config,
        )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's hidden size, the longest row
    that registers hold, and a longer one."""
    cases = []
    for name, hidden, has_residual in (
        ("bf16", 4096, False),
        ("bf16", 4096, True),
        ("fp32", 4096, True),
        ("bf16", WHOLE_ROW, True),
        ("fp32", WHOLE_ROW, True),
        ("bf16", 2 * WHOLE_ROW, True),
        ("fp32", 2 * WHOLE_ROW, False),
    ):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
        pointers = ["x_ptr", "weight_ptr", "out_ptr"]
        pointers += ["residual_ptr", "summed_ptr"] if has_residual else []
        numbers = ("hidden", "stride_x_token", "stride_residual_token")
        signature = dict.fromkeys(pointers, f"*{name}") | dict.fromkeys(numbers, "i32")
        shape = f"4096 tokens of 4096{', residual' if has_residual else ''}"
        headline = name == "bf16" and hidden == 4096
        cases.append(
            {
                "case": f"{name} {hidden}{' add' if has_residual else ''}",
                "kernel": rms_norm_kernel,
                "signature": signature | {"eps": "fp32"},
                "constexprs": {"WHOLE": hidden <= WHOLE_ROW, **tile_config(hidden, dtype, arch)},
                "due": ("load_16", "store_16"),
                "work": {shape: work(4096, 4096, has_residual, dtype)} if headline else {},
            }
        )
    return cases

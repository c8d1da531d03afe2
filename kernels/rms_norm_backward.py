"""Gradients of rms_norm and add_rms_norm in Triton.

With value the normed row, inverse = rsqrt(mean(value^2) + eps) and d = grad * weight:

    d_x      = inverse * (d - value * inverse^2 * mean(d * value))    + grad_summed, if added
    d_weight = sum over tokens of grad * value * inverse

A token moves 3 * hidden * itemsize bytes (x and grad in, d_x out), 6 with a residual, for about 12
operations an element: bound by memory. Predicted for 4096 tokens of hidden 4096 in bf16, 101 MB
and 201 MB, and 8 MB of partial sums, at the data sheets' bandwidth: A100 (2.0 TB/s) 54 and 105 us,
H100 (3.35) 33 and 62 us, H200 (4.8) 23 and 44 us. A row that does not fit into registers has
several programs, each of which reads all of it, from L2 but once, for the two sums.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.processor import processor
from mistral_kernels.kernels.rounded_sum import rounded_sum
from mistral_kernels.kernels.sum_parts import sum_parts

WHOLE_ROW = 8192  # value, grad, weight and d_weight of a row fit into registers
PIECE = 4096  # of a longer row; not measured
MAX_PARTS = 256  # about two programs an SM; more would only add partial sums


@triton.jit(do_not_specialize=["tokens", "rows"])  # another number must not compile it anew
def rms_norm_backward_kernel(
    grad_ptr,  # (tokens, hidden), contiguous: of the normed output
    grad_summed_ptr,  # (tokens, hidden), contiguous; None without a residual
    x_ptr,  # (tokens, hidden), last dimension contiguous
    residual_ptr,  # (tokens, hidden), last dimension contiguous; None without a residual
    weight_ptr,  # (hidden,)
    d_x_ptr,  # (tokens, hidden), contiguous
    d_residual_ptr,  # (tokens, hidden), contiguous; None without a residual
    partial_ptr,  # (parts, hidden) fp32; None where d_weight is not asked for
    tokens,  # i32
    hidden,  # i32
    rows,  # i32, tokens a program owns
    stride_x_token,
    stride_residual_token,
    eps,  # fp32
    WHOLE: tl.constexpr,  # BLOCK_HIDDEN holds a row
    BLOCK_HIDDEN: tl.constexpr,  # power of two
    STAGES: tl.constexpr,  # 2: the next row is on its way while this one is worked on
):
    """Grid (parts, pieces). A program owns a piece of `rows` rows in turn, and of d_weight."""
    pid = tl.program_id(0).to(tl.int64)  # row * stride may pass 2^31
    offs = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    mask = offs < hidden
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_HIDDEN,), tl.float32)

    first = pid * rows
    for row in tl.range(first, tl.minimum(first + rows, tokens), num_stages=STAGES):
        x_row, grad_row = x_ptr + row * stride_x_token, grad_ptr + row * hidden
        residual_row = residual_ptr
        if residual_ptr is not None:
            residual_row += row * stride_residual_token
        value = rounded_sum(x_row, residual_row, offs, mask)
        grad = tl.load(grad_row + offs, mask=mask, other=0.0).to(tl.float32)
        d_normed = grad * weight
        squares, products = value * value, d_normed * value
        if not WHOLE:
            squares, products = _sums(
                x_row, residual_row, grad_row, weight_ptr, hidden, BLOCK_HIDDEN
            )

        inverse = tl.rsqrt(tl.sum(squares, axis=0) / hidden + eps)
        normed = value * inverse
        d_weight += grad * normed
        d_x = inverse * (d_normed - normed * (inverse * tl.sum(products, axis=0) / hidden))
        if residual_ptr is not None:
            d_x += tl.load(grad_summed_ptr + row * hidden + offs, mask=mask, other=0.0)
        d_x = d_x.to(d_x_ptr.dtype.element_ty)
        tl.store(d_x_ptr + row * hidden + offs, d_x, mask=mask)
        if residual_ptr is not None:
            tl.store(d_residual_ptr + row * hidden + offs, d_x, mask=mask)

    if partial_ptr is not None:
        tl.store(partial_ptr + pid * hidden + offs, d_weight, mask=mask)


@triton.jit
def _sums(x_row, residual_row, grad_row, weight_ptr, hidden, BLOCK_HIDDEN: tl.constexpr):
    """value^2 and d * value of a row, added up piece by piece, in the same order for all pieces."""
    squares = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    products = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    for first in range(0, hidden, BLOCK_HIDDEN):
        offs = first + tl.arange(0, BLOCK_HIDDEN)
        mask = offs < hidden
        value = rounded_sum(x_row, residual_row, offs, mask)
        grad = tl.load(grad_row + offs, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        squares += value * value
        products += grad * weight * value
    return squares, products


def tile_config(
    hidden: int, has_residual: bool, dtype: torch.dtype, arch: tuple[int, int]
) -> dict[str, int]:
    """Tile, warps and stages for rows of `hidden` elements on capability `arch`; not measured.

    As forward, one warp for each 512 elements, so that a thread holds 16 of each of value, grad,
    weight and d_weight. Rows are fetched ahead where two programs then fit into the shared memory
    of an A100's SM, and so one into the 99 KB of smaller GPUs; otherwise 32 warps hold the row, of
    which 16 would spill. Pieces of a longer row are not fetched ahead.
    """
    whole = hidden <= WHOLE_ROW
    block_hidden = triton.next_power_of_2(hidden) if whole else PIECE
    ahead_bytes = (4 if has_residual else 2) * block_hidden * dtype.itemsize
    stages = 2 if whole and ahead_bytes <= 64 * 1024 else 1
    warps = 32 if whole and stages == 1 else min(max(block_hidden // 512, 1), 16)
    return {"BLOCK_HIDDEN": block_hidden, "STAGES": stages, "num_warps": warps}


def work(tokens: int, hidden: int, has_residual: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that rms_norm_backward_kernel moves, and its operations."""
    parts = triton.cdiv(tokens, triton.cdiv(tokens, MAX_PARTS))
    rows = (6 if has_residual else 3) * tokens + 1
    return (rows * dtype.itemsize + 4 * parts) * hidden, 12 * tokens * hidden


def rms_norm_backward(
    grad: torch.Tensor,
    grad_summed: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    d_x: torch.Tensor,
    d_residual: torch.Tensor | None,
    d_weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Writes `d_x`, `d_weight` if asked for, and `d_residual` where there is a residual.

    Args:
        grad: (tokens, hidden), x's dtype, contiguous: the gradient of the normed rows.
        grad_summed: like grad, of the sum; None for plain rms_norm.
        x: (tokens, hidden), any float dtype, last dimension contiguous.
        residual: like x, or None for plain rms_norm.
        weight: (hidden,), x's dtype.
        d_x: (tokens, hidden), x's dtype, contiguous.
        d_residual: like d_x; None as residual is.
        d_weight: (hidden,), x's dtype; None: it is not asked for.
        eps: as in the forward.
    """
    tokens, hidden = x.shape
    if tokens == 0:
        if d_weight is not None:
            d_weight.zero_()
        return
    # Each bit depends on how tokens are dealt out: on their number alone, not on the GPU.
    rows = triton.cdiv(tokens, MAX_PARTS)
    parts = triton.cdiv(tokens, rows)
    partial = None if d_weight is None else x.new_empty((parts, hidden), dtype=torch.float32)
    arch, _ = processor(x.device)
    config = tile_config(hidden, residual is not None, x.dtype, arch)
    pieces = triton.cdiv(hidden, config["BLOCK_HIDDEN"])
    stride_residual = residual.stride(0) if residual is not None else 0
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rms_norm_backward_kernel[(parts, pieces)](
            grad, grad_summed, x, residual, weight, d_x, d_residual, partial,
            tokens, hidden, rows, x.stride(0), stride_residual, eps, WHOLE=pieces == 1, **config,
        )  # fmt: skip
        if d_weight is not None:
            sum_parts(partial, d_weight)


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's hidden size, the longest row
    that registers hold, and a longer one."""
    cases = []
    for name, hidden, has_residual, of_weight in (
        ("bf16", 4096, False, True),
        ("bf16", 4096, True, True),
        ("bf16", 4096, False, False),
        ("fp32", 4096, True, True),
        ("bf16", WHOLE_ROW, True, True),
        ("fp32", WHOLE_ROW, True, True),
        ("fp32", 2 * WHOLE_ROW, True, True),
    ):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
        pointers = ["grad_ptr", "x_ptr", "weight_ptr", "d_x_ptr"]
        pointers += ["grad_summed_ptr", "residual_ptr", "d_residual_ptr"] if has_residual else []
        numbers = ("tokens", "hidden", "rows", "stride_x_token", "stride_residual_token")
        signature = dict.fromkeys(pointers, f"*{name}") | dict.fromkeys(numbers, "i32")
        signature |= {"eps": "fp32", "partial_ptr": "*fp32" if of_weight else "constexpr"}
        config = tile_config(hidden, has_residual, dtype, arch)
        ahead = ("cp_async",) if config["STAGES"] == 2 else ()
        shape = f"4096 tokens of 4096{', residual' if has_residual else ''}"
        headline = name == "bf16" and hidden == 4096 and of_weight
        cases.append(
            {
                "case": f"{name} {hidden}{' add' if has_residual else ''}"
                f"{'' if of_weight else ' of x alone'}",
                "kernel": rms_norm_backward_kernel,
                "signature": signature,
                "constexprs": {"WHOLE": hidden <= WHOLE_ROW, **config},
                "due": (*ahead, "load_16", "store_16"),
                "work": {shape: work(4096, 4096, has_residual, dtype)} if headline else {},
            }
        )
    return cases

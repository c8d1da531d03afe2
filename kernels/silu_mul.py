"""silu_mul in Triton: out = gate * sigmoid(gate) * up, and its backward.

    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up   = grad * gate * sigmoid

A token moves 3 * ffn_dim * itemsize bytes forward (gate and up in, out out) for about 6 * ffn_dim
operations, and 5 * ffn_dim * itemsize backward (gate, up, grad in, both gradients out): bound by
memory at every size. Predicted for 4096 tokens of ffn_dim 14336 in bf16, 352 MB forward and 587 MB
backward, at the data sheets' bandwidth: A100 (2.0 TB/s) 173 and 288 us, H100 (3.35) 105 and 175 us,
H200 (4.8) 73 and 122 us. Not measured.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.processor import processor


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # (tokens, 2 * ffn_dim), gate first, last dimension contiguous
    out_ptr,  # (tokens, ffn_dim), contiguous
    ffn_dim,  # i32
    stride_gate_up_token,
    BLOCK_FFN: tl.constexpr,  # power of two
):
    """Grid (tokens, cdiv(ffn_dim, BLOCK_FFN)). A program owns a piece of one row."""
    token = tl.program_id(0).to(tl.int64)  # token * stride may pass 2^31
    offs = tl.program_id(1) * BLOCK_FFN + tl.arange(0, BLOCK_FFN)
    mask = offs < ffn_dim

    gate_row = gate_up_ptr + token * stride_gate_up_token
    gate = tl.load(gate_row + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_row + ffn_dim + offs, mask=mask, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * ffn_dim + offs, out, mask=mask)


@triton.jit
def silu_mul_backward_kernel(
    grad_ptr,  # (tokens, ffn_dim), contiguous
    gate_up_ptr,  # (tokens, 2 * ffn_dim), gate first, last dimension contiguous
    d_gate_up_ptr,  # (tokens, 2 * ffn_dim), contiguous
    ffn_dim,  # i32
    stride_gate_up_token,
    BLOCK_FFN: tl.constexpr,  # power of two
):
    """Grid (tokens, cdiv(ffn_dim, BLOCK_FFN)). A program owns a piece of one row.

    The sigmoid is computed again: keeping it would cost more bytes than it costs operations.
    """
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_FFN + tl.arange(0, BLOCK_FFN)
    mask = offs < ffn_dim

    gate_row = gate_up_ptr + token * stride_gate_up_token
    gate = tl.load(gate_row + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_row + ffn_dim + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + token * ffn_dim + offs, mask=mask, other=0.0).to(tl.float32)

    sigmoid = tl.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = grad * gate * sigmoid
    d_gate_row = d_gate_up_ptr + token * 2 * ffn_dim
    tl.store(d_gate_row + offs, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_row + ffn_dim + offs, d_up.to(d_gate_up_ptr.dtype.element_ty), mask=mask)


def tile_config(ffn_dim: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tile and warps for rows of `ffn_dim` outputs on compute capability `arch`; not measured.

    8 elements a thread: one 16-byte bf16 load of gate and one of up, two of fp32. Pieces of 1024
    keep 14 programs busy at a single token of ffn_dim 14336, and 2048 threads on an SM have 64 KB
    in flight, twice what hides the latency of memory on an H200.
    """
    block_ffn = min(triton.next_power_of_2(ffn_dim), 1024)
    return {"BLOCK_FFN": block_ffn, "num_warps": max(block_ffn // 256, 1)}


def work(tokens: int, ffn_dim: int, backward: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    tensors, operations = (5, 12) if backward else (3, 6)
    return tensors * tokens * ffn_dim * dtype.itemsize, operations * tokens * ffn_dim


def _launch(kernel, gate_up: torch.Tensor, *arguments: torch.Tensor) -> None:
    tokens, ffn_dim = gate_up.shape[0], gate_up.shape[1] // 2
    if tokens == 0 or ffn_dim == 0:
        return
    arch, _ = processor(gate_up.device)
    config = tile_config(ffn_dim, gate_up.dtype, arch)
    grid = (tokens, triton.cdiv(ffn_dim, config["BLOCK_FFN"]))
    with torch.cuda.device_of(gate_up):  # Triton launches on the current device
        kernel[grid](*arguments, ffn_dim, gate_up.stride(0), **config)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `out`.

    Args:
        gate_up: (tokens, 2 * ffn_dim), any float dtype, gate first, last dimension contiguous.
        out: (tokens, ffn_dim), gate_up's dtype, contiguous.
    """
    _launch(silu_mul_kernel, gate_up, gate_up, out)


def silu_mul_backward(grad: torch.Tensor, gate_up: torch.Tensor, d_gate_up: torch.Tensor) -> None:
    """Writes `d_gate_up`.

    Args:
        grad: (tokens, ffn_dim), gate_up's dtype, contiguous.
        gate_up: (tokens, 2 * ffn_dim), any float dtype, gate first, last dimension contiguous.
        d_gate_up: like gate_up, contiguous.
    """
    _launch(silu_mul_backward_kernel, gate_up, grad, gate_up, d_gate_up)


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's ffn_dim."""
    tensors = {
        silu_mul_kernel: ("gate_up_ptr", "out_ptr"),
        silu_mul_backward_kernel: ("grad_ptr", "gate_up_ptr", "d_gate_up_ptr"),
    }
    sizes = {"ffn_dim": "i32", "stride_gate_up_token": "i32"}
    return [
        {
            "case": f"{name} 14336",
            "kernel": kernel,
            "signature": dict.fromkeys(pointers, f"*{name}") | sizes,
            "constexprs": tile_config(14336, dtype, arch),
            "due": ("load_16", "store_16"),
            "work": {"4096 tokens of 14336": work(4096, 14336, "grad_ptr" in pointers, dtype)}
            if name == "bf16"
            else {},
        }
        for kernel, pointers in tensors.items()
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
    ]

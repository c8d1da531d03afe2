"""rope in Triton: each pair (a, b) of a head becomes (a cos - b sin, b cos + a sin).

The backward turns the gradients by the opposite angle (INVERSE). A token moves
2 * (q_heads + kv_heads) * head_dim * itemsize bytes and reads head_dim * 4 of tables, for 3
operations an element: bound by memory at every size. Predicted for 4096 tokens of 32 + 8 heads of
128 in bf16, 86 MB, at the data sheets' bandwidth: A100 (2.0 TB/s) 42 us, H100 26 us, H200 18 us.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.processor import processor


@triton.jit
def rope_kernel(
    q_ptr,  # (tokens, q_heads, HEAD_DIM), last dimension contiguous
    k_ptr,  # (tokens, kv_heads, HEAD_DIM), last dimension contiguous
    out_q_ptr,  # like q; q_ptr itself turns in place
    out_k_ptr,  # like k
    cos_ptr,  # (max_positions, HEAD_DIM / 2) fp32
    sin_ptr,  # (max_positions, HEAD_DIM / 2) fp32
    positions_ptr,  # (tokens,) i32; a row with a negative one stays as it is
    q_scale_ptr,  # (max_positions,) fp32 or None
    q_heads,  # i32
    kv_heads,  # i32
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_out_q_token,
    stride_out_q_head,
    stride_out_k_token,
    stride_out_k_head,
    stride_cos,
    stride_sin,
    INVERSE: tl.constexpr,  # turn by the opposite angle
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # power of two
    BLOCK_PAIRS: tl.constexpr,  # power of two, at least HEAD_DIM / 2
):
    """Grid (tokens, cdiv(q_heads, BLOCK_HEADS) + cdiv(kv_heads, BLOCK_HEADS)).

    A program owns BLOCK_HEADS heads of one token: of q, or, behind those, of k.
    """
    tl.static_assert(HEAD_DIM % 2 == 0)
    token = tl.program_id(0).to(tl.int64)  # token * stride may pass 2^31
    pid_heads = tl.program_id(1)
    position = tl.load(positions_ptr + token)
    row = tl.maximum(position, 0).to(tl.int64)
    cos_row, sin_row = cos_ptr + row * stride_cos, sin_ptr + row * stride_sin
    idle = position < 0  # the row is copied

    # Heads of q or of k.
    q_blocks = tl.cdiv(q_heads, BLOCK_HEADS)
    of_q = pid_heads < q_blocks
    block = tl.where(of_q, pid_heads, pid_heads - q_blocks)
    offs_head = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    if of_q:
        mask_head = offs_head < q_heads
        x_rows = q_ptr + token * stride_q_token + offs_head * stride_q_head
        out_rows = out_q_ptr + token * stride_out_q_token + offs_head * stride_out_q_head
    else:
        mask_head = offs_head < kv_heads
        x_rows = k_ptr + token * stride_k_token + offs_head * stride_k_head
        out_rows = out_k_ptr + token * stride_out_k_token + offs_head * stride_out_k_head
    scale = 1.0
    if q_scale_ptr is not None:
        scale = tl.load(q_scale_ptr + row, mask=of_q, other=1.0)
    offs_pair = tl.arange(0, BLOCK_PAIRS)
    mask_pair = mask_head & (offs_pair < HEAD_DIM // 2)[None, :]

    # Once for each head: a thread finds the pairs that it needs in L1, and no barrier is due.
    offs_table = tl.zeros((BLOCK_HEADS, 1), tl.int32) + offs_pair[None, :]
    cos = tl.load(cos_row + offs_table, mask=mask_pair, other=0.0)
    sin = tl.load(sin_row + offs_table, mask=mask_pair, other=0.0)
    if INVERSE:
        sin = -sin

    # A row is read whole and taken apart in registers: pairs are too narrow for 128-bit loads.
    if INTERLEAVED:
        offs = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        mask = mask_head & (offs < HEAD_DIM)
        x = tl.load(x_rows + offs, mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_HEADS, BLOCK_PAIRS, 2)))
        turned = tl.join((a * cos - b * sin) * scale, (b * cos + a * sin) * scale)
        out = tl.reshape(turned, (BLOCK_HEADS, 2 * BLOCK_PAIRS)).to(x.dtype)
        tl.store(out_rows + offs, tl.where(idle, x, out), mask=mask)
    else:
        offs = offs_pair[None, :]
        first = tl.load(x_rows + offs, mask=mask_pair, other=0.0)
        second = tl.load(x_rows + HEAD_DIM // 2 + offs, mask=mask_pair, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        out_first = ((a * cos - b * sin) * scale).to(first.dtype)
        out_second = ((b * cos + a * sin) * scale).to(first.dtype)
        tl.store(out_rows + offs, tl.where(idle, first, out_first), mask=mask_pair)
        out_second = tl.where(idle, second, out_second)
        tl.store(out_rows + HEAD_DIM // 2 + offs, out_second, mask=mask_pair)


def tile_config(
    q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, arch: tuple[int, int]
) -> dict[str, int]:
    """Heads a program and warps on compute capability `arch`; not measured.

    About 1024 elements, 8 heads of 128: five programs a token of 32 + 8 heads, so that one token
    still fills several SMs. A thread holds 8 pairs: with the halves of a head apart that is one
    16-byte bf16 load of each.
    """
    block_pairs = triton.next_power_of_2(max(head_dim // 2, 1))
    most = triton.next_power_of_2(max(q_heads, kv_heads, 1))
    block_heads = max(min(512 // block_pairs, most), 1)
    warps = min(max(block_heads * block_pairs // 256, 1), 16)
    return {"BLOCK_HEADS": block_heads, "BLOCK_PAIRS": block_pairs, "num_warps": warps}


def work(
    tokens: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    elements = tokens * (q_heads + kv_heads) * head_dim
    return 2 * elements * dtype.itemsize + tokens * (4 * head_dim + 4), 3 * elements


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    q_scale: torch.Tensor | None,
    *,
    out_q: torch.Tensor,
    out_k: torch.Tensor,
    inverse: bool = False,
) -> None:
    """Writes `out_q` and `out_k`, which may be q and k themselves.

    Args:
        q: (tokens, q_heads, head_dim), any float dtype, last dimension contiguous.
        k: (tokens, kv_heads, head_dim), like q.
        cos, sin: (max_positions, head_dim / 2), float32, last dimension contiguous.
        positions: (tokens,), int32, contiguous.
        interleaved: pairs (0,1)(2,3).. or, if not, (0,d/2)(1,d/2+1)..
        q_scale: (max_positions,), float32, or None.
        out_q, out_k: like q and k, any strides but a contiguous last dimension.
        inverse: turn by the opposite angle, as a gradient does.
    """
    (tokens, q_heads, head_dim), kv_heads = q.shape, k.shape[1]
    arch, _ = processor(q.device)
    config = tile_config(q_heads, kv_heads, head_dim, q.dtype, arch)
    blocks = sum(triton.cdiv(heads, config["BLOCK_HEADS"]) for heads in (q_heads, kv_heads))
    if tokens * blocks * head_dim == 0:
        return
    strides = [stride for x in (q, k, out_q, out_k) for stride in x.stride()[:2]]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        rope_kernel[(tokens, blocks)](
            q, k, out_q, out_k, cos, sin, positions, q_scale, q_heads, kv_heads,
            *strides, cos.stride(0), sin.stride(0),
            INVERSE=inverse, INTERLEAVED=interleaved, HEAD_DIM=head_dim, **config,
        )  # fmt: skip


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 32 and 8 heads of 128, and of 80."""
    cases = []
    for name, head_dim, interleaved, inverse in (
        ("bf16", 128, True, False),
        ("bf16", 128, False, False),
        ("bf16", 128, False, True),
        ("bf16", 80, True, True),
        ("fp32", 128, True, True),
        ("fp32", 80, False, False),
    ):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
        numbers = (argument for argument in rope_kernel.arg_names if argument.islower())
        signature = dict.fromkeys(numbers, "i32") | {"positions_ptr": "*i32"}
        signature |= dict.fromkeys(("q_ptr", "k_ptr", "out_q_ptr", "out_k_ptr"), f"*{name}")
        signature |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
        signature["q_scale_ptr"] = "constexpr" if head_dim == 80 else "*fp32"
        flags = {"INVERSE": inverse, "INTERLEAVED": interleaved, "HEAD_DIM": head_dim}
        headline = name == "bf16" and head_dim == 128 and not inverse
        layout = "interleaved" if interleaved else "half-split"
        shape = f"4096 tokens of 32 + 8 heads of 128, {layout}"
        cases.append(
            {
                "case": f"{name} {head_dim} {layout}{' inverse' if inverse else ''}",
                "kernel": rope_kernel,
                "signature": signature,
                "constexprs": flags | tile_config(32, 8, head_dim, dtype, arch),
                "due": ("load_16", "store_16") if head_dim == 128 else (),
                "work": {shape: work(4096, 32, 8, 128, dtype)} if headline else {},
            }
        )
    return cases

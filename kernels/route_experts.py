"""route_experts in Triton: the top_k largest logits of a token, and a softmax over them.

A token moves experts * itemsize + 8 * top_k bytes and takes about 10 * top_k * experts operations,
all in registers. Predicted for 4096 tokens of 8 experts, top-2, in bf16, 131 KB: 2 us on A100, H100
and H200, the latency of a launch, a load and a store.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.processor import processor

MAX_EXPERTS = 4096  # a token's keys live in registers: 8 of 64 bits a thread at 16 warps


@triton.jit
def _choose(
    logits_ptr,  # (tokens, experts), last dimension contiguous
    offs_token,  # (BLOCK_TOKENS, 1) i64
    offs_expert,  # (1, BLOCK_EXPERTS) i32
    mask,
    stride_logits_token,
    TOP_K: tl.constexpr,
):
    """Returns each expert's slot among the chosen, else -1, and its weight, else 0.

    Both are (BLOCK_TOKENS, BLOCK_EXPERTS).
    """
    row = logits_ptr + offs_token * stride_logits_token
    logits = tl.load(row + offs_expert, mask=mask, other=float("-inf")).to(tl.float32)

    # A key orders as its logit and then the lower index do, which floats with NaN and -0 do not.
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(logits == logits, ordered, 0x7FFFFFFF)  # NaN comes before infinity
    taken: tl.constexpr = -(2**63)
    key = tl.where(mask, (ordered.to(tl.int64) << 32) - offs_expert, taken)
    slot = tl.full(key.shape, -1, tl.int32)
    for i in range(TOP_K):
        first = mask & (key == tl.max(key, axis=1, keep_dims=True))
        slot = tl.where(first, i, slot)
        key = tl.where(first, taken, key)

    # The largest logit is among the chosen ones; a NaN makes the sum NaN, and so all weights.
    share = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    share = tl.where(slot >= 0, share, 0.0)
    weight = share / tl.sum(share, axis=1, keep_dims=True)
    return slot, tl.where(slot >= 0, weight, 0.0)


@triton.jit(do_not_specialize=["tokens"])  # a batch of one must not compile it anew
def route_experts_kernel(
    logits_ptr,  # (tokens, experts), last dimension contiguous
    positions_ptr,  # (tokens,) i32, negative for an idle token; None: all are live
    weights_ptr,  # (tokens, TOP_K) fp32, contiguous
    expert_ids_ptr,  # (tokens, TOP_K) i32, contiguous
    tokens,  # i32
    experts,  # i32
    stride_logits_token,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # power of two
    BLOCK_EXPERTS: tl.constexpr,  # power of two, at least experts
):
    """Grid (cdiv(tokens, BLOCK_TOKENS),). A program owns BLOCK_TOKENS tokens."""
    offs_token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    mask_token = offs_token < tokens
    mask = mask_token[:, None] & (offs_expert < experts)
    slot, weight = _choose(
        logits_ptr, offs_token[:, None], offs_expert, mask, stride_logits_token, TOP_K
    )
    position = tl.zeros((BLOCK_TOKENS,), tl.int32)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + offs_token, mask=mask_token, other=0)
    idle = position < 0

    for i in range(TOP_K):
        expert_id = tl.sum(tl.where(slot == i, offs_expert, 0), axis=1)
        slot_weight = tl.sum(tl.where(slot == i, weight, 0.0), axis=1)
        offs_out = offs_token * TOP_K + i
        tl.store(expert_ids_ptr + offs_out, tl.where(idle, -1, expert_id), mask=mask_token)
        tl.store(weights_ptr + offs_out, tl.where(idle, 0.0, slot_weight), mask=mask_token)


@triton.jit(do_not_specialize=["tokens"])
def route_experts_backward_kernel(
    grad_ptr,  # (tokens, TOP_K) fp32, contiguous: of the weights
    logits_ptr,  # (tokens, experts), last dimension contiguous
    positions_ptr,  # (tokens,) i32, negative for an idle token; None: all are live
    d_logits_ptr,  # (tokens, experts), contiguous
    tokens,  # i32
    experts,  # i32
    stride_logits_token,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # power of two
    BLOCK_EXPERTS: tl.constexpr,  # power of two, at least experts
):
    """Grid (cdiv(tokens, BLOCK_TOKENS),). A program owns BLOCK_TOKENS tokens.

    At the chosen experts the softmax's gradient, weight * (grad - sum(grad * weight)), else 0.
    """
    offs_token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    offs_expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    mask_token = offs_token < tokens
    mask = mask_token & (offs_expert < experts)
    slot, weight = _choose(logits_ptr, offs_token, offs_expert, mask, stride_logits_token, TOP_K)

    live = slot >= 0
    if positions_ptr is not None:
        live &= tl.load(positions_ptr + offs_token, mask=mask_token, other=0) >= 0
    grad = tl.load(grad_ptr + offs_token * TOP_K + slot, mask=live, other=0.0)
    d_logits = weight * (grad - tl.sum(grad * weight, axis=1, keep_dims=True))
    d_logits = tl.where(live, d_logits, 0.0).to(d_logits_ptr.dtype.element_ty)
    tl.store(d_logits_ptr + offs_token * experts + offs_expert, d_logits, mask=mask)


def tile_config(
    experts: int, top_k: int, dtype: torch.dtype, arch: tuple[int, int]
) -> dict[str, int]:
    """Tokens a program and warps on compute capability `arch`; not measured.

    8 keys a thread: of 8 experts in bf16 that is a token, read by one 16-byte load and sorted with
    no word to other threads, and a program of 32 tokens is one warp, which waits for no barrier.
    """
    block_experts = triton.next_power_of_2(experts)
    block_tokens = max(256 // block_experts, 1)
    warps = min(max(block_tokens * block_experts // 256, 1), 16)
    return {"BLOCK_TOKENS": block_tokens, "BLOCK_EXPERTS": block_experts, "num_warps": warps}


def work(
    tokens: int, experts: int, top_k: int, backward: bool, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    row_bytes = experts * dtype.itemsize + 8 * top_k
    if backward:
        row_bytes += experts * dtype.itemsize - 4 * top_k  # only gradients in, and logits' out
    return tokens * row_bytes, 10 * tokens * experts * top_k


def _launch(kernel, logits: torch.Tensor, top_k: int, *arguments: torch.Tensor | None) -> None:
    tokens, experts = logits.shape
    if tokens == 0:
        return
    arch, _ = processor(logits.device)
    config = tile_config(experts, top_k, logits.dtype, arch)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        kernel[(triton.cdiv(tokens, config["BLOCK_TOKENS"]),)](
            *arguments, tokens, experts, logits.stride(0), TOP_K=top_k, **config
        )


def route_experts(
    logits: torch.Tensor,
    top_k: int,
    positions: torch.Tensor | None,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
) -> None:
    """Writes `weights` and `expert_ids`.

    Args:
        logits: (tokens, experts), any float dtype, last dimension contiguous.
        top_k: experts a token.
        positions: (tokens,), int32, contiguous, negative for idle tokens; or None.
        weights: (tokens, top_k), float32, contiguous.
        expert_ids: (tokens, top_k), int32, contiguous.
    """
    _launch(route_experts_kernel, logits, top_k, logits, positions, weights, expert_ids)


def route_experts_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    top_k: int,
    positions: torch.Tensor | None,
    d_logits: torch.Tensor,
) -> None:
    """Writes `d_logits`: like logits, contiguous; `grad` is that of the weights, contiguous."""
    _launch(route_experts_backward_kernel, logits, top_k, grad, logits, positions, d_logits)


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mixtral's 8 experts and the most, top-2."""
    dtype = torch.bfloat16
    outputs = {
        route_experts_kernel: {"weights_ptr": "*fp32", "expert_ids_ptr": "*i32"},
        route_experts_backward_kernel: {"grad_ptr": "*fp32", "d_logits_ptr": "*bf16"},
    }
    inputs = {"logits_ptr": "*bf16", "positions_ptr": "*i32"}
    inputs |= dict.fromkeys(("tokens", "experts", "stride_logits_token"), "i32")
    return [
        {
            "case": f"bf16 {experts} top-2",
            "kernel": kernel,
            "signature": inputs | tensors,
            "constexprs": {"TOP_K": 2, **tile_config(experts, 2, dtype, arch)},
            "due": (),
            "work": {"4096 tokens of 8, top-2": work(4096, 8, 2, "grad_ptr" in tensors, dtype)}
            if experts == 8
            else {},
        }
        for kernel, tensors in outputs.items()
        for experts in (8, MAX_EXPERTS)
    ]

"""expert_mlp in Triton: out[t] = sum over slots of weight * w2[e] (silu(w1[e] x[t]) * w3[e] x[t]).

Three launches: up (gather, both products, SwiGLU), down, combine; many tokens are planned in front
and worked by persistent programs in an order that L2 likes (expert_tiles says how and why).
Intermediates: `inner`, SwiGLU's results in x's dtype, and `slots`, what w2 makes of them, in fp32.

A call reads 3 * hidden * ffn_dim * itemsize bytes of each used expert and does 6 * hidden * ffn_dim
operations a pair. One 8x7B layer in bf16 at the data sheets' 2.0, 3.35, 4.8 TB/s and 312, 989, 989
TFLOP/s of A100, H100, H200 (not measured):

    tokens     GB read    TFLOP    A100       H100       H200
         1       0.70   0.0007     0.35 ms    0.21 ms    0.15 ms    memory
         8       2.54   0.0056     1.3        0.76       0.53       memory, 7.2 experts
     4,096       5.64      2.9     9.2        2.9        2.9        matrix units, in two chunks
"""

import torch

from mistral_kernels.kernels.expert_steps import bytes_a_token as bytes_a_token
from mistral_kernels.kernels.expert_steps import expert_steps


def expert_mlp(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    out: torch.Tensor,
    batch_invariant: bool,
) -> None:
    """Writes `out`.

    Args:
        x: (tokens, hidden), any float dtype; all inputs have a contiguous last dimension.
        w13: (experts, 2 * ffn_dim, hidden), gate rows first, x's dtype.
        w2: (experts, hidden, ffn_dim), x's dtype.
        weights: (tokens, top_k), float32.
        expert_ids: (tokens, top_k), int32; outside [0, experts) is skipped.
        out: (tokens, hidden), x's dtype, contiguous.
        batch_invariant: the same tiles and order of sums for any number of tokens.
    """
    experts, _, ffn_dim = w2.shape
    if len(x) == 0 or w2.numel() == 0:
        out.zero_()  # without experts every slot is skipped
        return
    w1_w3, sizes = w13.unflatten(1, (2, ffn_dim)), (experts, ffn_dim)
    expert_steps(x, w1_w3, w2, weights, expert_ids, out, sizes, batch_invariant)

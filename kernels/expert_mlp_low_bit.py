"""expert_mlp_low_bit in Triton: the steps of `expert_mlp`, whose grouped GEMMs unpack the codes.

Codes are read where elements would be, once by each row tile of an expert: 3 * hidden * ffn_dim of
4 or 8 bits of each used expert. One 8x7B layer at the data sheets' 2.0, 3.35, 4.8 TB/s of A100,
H100, H200; behind each what the instructions that unpack take, as in `linear_low_bit` (not
measured):

    tokens    format       GB    A100           H100           H200
         1    int4 g128   0.18   0.09 / 0.12    0.05 / 0.08    0.04 / 0.08 ms    instructions
         1    int8        0.35   0.17 / 0.11    0.11 / 0.07    0.07 / 0.07       memory
         8    int4 g128   0.65   0.32 / 0.44    0.19 / 0.29    0.14 / 0.29       instructions
         8    int8        1.27   0.62 / 0.40    0.38 / 0.26    0.26 / 0.26       memory

bf16 takes 0.35, 0.21, 0.15 ms for a token.
"""

import torch

from mistral_kernels.kernels.expert_steps import bytes_a_token as bytes_a_token
from mistral_kernels.kernels.expert_steps import expert_steps
from mistral_kernels.kernels.low_bit_codes import as_codes

LowBit = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def expert_mlp_low_bit(
    x: torch.Tensor,
    w13: LowBit,
    w2: LowBit,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes `out`.

    Args:
        x: (tokens, hidden), any float dtype, last dimension contiguous.
        w13: codes, scales, zeros, perm in the layout of `ops.low_bit`, all contiguous, rows in
            whole words: of (experts, 2 * ffn_dim, hidden), gate rows first.
        w2: the same, of (experts, hidden, ffn_dim).
        weights: (tokens, top_k), float32, last dimension contiguous.
        expert_ids: (tokens, top_k), int32, last dimension contiguous; outside [0, experts) is
            skipped.
        out: (tokens, hidden), x's dtype, contiguous.
    """
    experts, rows = w13[0].shape[:2]
    if out.numel() == 0 or experts * rows == 0:
        out.zero_()  # without experts every slot is skipped
        return
    up, down, sizes = as_codes(*w13), as_codes(*w2), (experts, rows // 2)
    up = up._replace(words=up.words.unflatten(1, (2, rows // 2)))
    expert_steps(x, up, down, weights, expert_ids, out, sizes, batch_invariant=False)

"""torch's own products of weights in few bits; signatures of torch 2.13.

It takes no float8 weights beside x in full: `_scaled_mm` wants x in float8 too, which is other
work with other results.
"""

import torch
from torch import Tensor

from mistral_kernels.ops.low_bit import INT4, LowBit, unpack

NAME = "torch_low_bit"
ROWS = 16  # of a packed weight, a multiple
INNER_K_TILES = 8  # of the GPU's layout


def missing(device: str) -> str | None:
    return None


def packed(weight: LowBit, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A symmetric int4 weight as torch wants it, made once and not timed.

    Returns:
        The codes in torch's layout, and (groups, out, 2) of `dtype`: scales, and 0, as a code of 8
        stands for 0 on both sides. None for another format, or rows that do not fill its tiles.
    """
    if weight.qweight.dtype != INT4 or weight.qweight.shape[0] % ROWS:
        return None
    codes = unpack(weight.qweight)
    if codes.is_cuda:  # two a byte, the even one in the upper half
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        tiles = torch._convert_weight_to_int4pack(pairs, INNER_K_TILES)
    else:
        tiles = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scales = weight.scales.T.to(dtype)
    return tiles, torch.stack((scales, torch.zeros_like(scales)), -1)


def linear_low_bit(shape, dtype, device):
    on_gpu = device == "cuda"
    int4_name = "_weight_int4pack_mm" if on_gpu else "_weight_int4pack_mm_for_cpu"
    name = {"int8": "_weight_int8pack_mm", "int4-g128": int4_name}.get(shape.format)
    if name is None:
        return f"takes no {shape.format} weights beside x in full"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", device.upper()):
        return f"torch {torch.__version__} has no {name} on {device}"
    product = getattr(torch, name)
    if shape.format == "int8":

        def int8(x, qweight, scales, zeros, perm, dense, pack):
            return product(x, qweight, scales.flatten())

        return int8
    if shape.out_dim % ROWS:
        return f"takes multiples of {ROWS} rows"
    if on_gpu and dtype != torch.bfloat16:
        return "takes bfloat16 only"

    def int4(x, qweight, scales, zeros, perm, dense, pack):
        return product(x, pack[0], 128, pack[1])

    return int4

"""Low-bit weights as the files of the published formats hold them, and their way to our layout.

Every format keeps a matrix as some tensors side by side, each with a role:

    codes    the weights, rounded
    scales   what they are multiplied by
    zeros    which code stands for 0.0
    order    which group each column belongs to
    shape    of the matrix
    bias     zeros, which old versions of AutoGPTQ wrote into every file

AWQ and GPTQ store the matrix transposed. Where several codes share a 32-bit word, the first lies in
the lowest bits, but AWQ deals eight neighbours out as 0 2 4 6 1 3 5 7:

    awq      qweight (in, out / 8)        qzeros (groups, out / 8)             scales (groups, out)
    gptq     qweight (in / 8, out)        qzeros (groups, out / 8)             scales (groups, out)
    packed   weight_packed (out, in / 8)  weight_zero_point (out / 8, groups)  weight_scale
    plain    weight (out, in)             weight_zero_point (out, groups)      weight_scale

Sources: awq/utils/packing_utils.py of AutoAWQ 0.2.9; convert_gptq_v1_to_v2_format_module in
gptqmodel's utils/model.py; pack_quantized/ and naive_quantized/ of compressed-tensors 0.20, which
reads no weight_g_idx any more: its meaning is that of GPTQ's g_idx.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.quantisation import Quantisation
from mistral_kernels.ops.low_bit import FP8, INT4, INT8, LowBit, pack, unpack

Parts = dict[str, Tensor]  # role -> tensor
Shapes = dict[str, tuple[int, ...]]
FLOATS = ("F32", "BF16", "F16")
WORD_BITS = 32
NIBBLES = 0x0F0F0F0F  # every second one


class Role(NamedTuple):
    """A tensor beside others: its names behind the layer's, its dtypes, and when there is one."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    needed: Callable[[Quantisation], bool] = lambda quantisation: True


class Format(NamedTuple):
    """How matrices are stored.

    `shapes` gives those of a matrix's tensors; scales that it leaves out, and zeros with them, are
    a grid (see `scale_grid`). `read` makes some rows of a matrix from its tensors; their number is
    a multiple of 8, except at the end.
    """

    roles: dict[str, Role]
    shapes: Callable[[Quantisation, int, int], Shapes]
    read: Callable[[Quantisation, Parts, slice], LowBit]


def scale_grid(shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int] | None:
    """How many scales a matrix has along its rows and columns.

    Args:
        shape: of the scale: (), (1,), (rows,) or (row blocks, column blocks).
        weight: of the matrix.

    Returns:
        (row blocks, column blocks); None if the scale does not fit the matrix.
    """
    grid = {0: (1, 1), 1: (*shape, 1), 2: shape}.get(len(shape))
    if grid is None or len(weight) != 2 or 0 in grid:
        return None
    return None if weight[0] % grid[0] or weight[1] % grid[1] else grid


def words(codes: int, bits: int) -> int:
    """How many 32-bit words hold so many codes."""
    return -(-codes * bits // WORD_BITS)


def kind(quantisation: Quantisation) -> torch.dtype:
    """The dtype of the layout's codes."""
    return FP8 if quantisation.floating else INT4 if quantisation.bits == 4 else INT8


def _octets(packed: Tensor) -> Tensor:
    """(..., n) words -> (..., 4 n) bytes, the lowest first."""
    if packed.stride(-1) != 1:  # is_contiguous() does not tell, where a row is one word
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.uint8)


def _codes(packed: Tensor, bits: int) -> Tensor:
    """(..., n) words -> (..., 32 / bits * n) codes as the layout has them: uint8 or int8."""
    octets = _octets(packed)
    return unpack(octets) if bits == 4 else _signed(octets)


def _signed(octets: Tensor) -> Tensor:
    """0 .. 255, with 128 for the middle, as int8."""
    return (octets ^ 128).view(INT8)


def _word_slice(rows: slice, bits: int) -> slice:
    return slice(rows.start * bits // WORD_BITS, words(rows.stop, bits))


def _by_row(scales: Tensor, rows: int) -> Tensor:
    """A grid of scales, as one line of them for each row of the matrix."""
    grid = scales.reshape(*scales.shape, *(1,) * (2 - scales.dim()))
    return grid.repeat_interleave(rows // len(grid), 0)


def _awq_shapes(quantisation: Quantisation, rows: int, columns: int) -> Shapes:
    groups = columns // (quantisation.group_size or columns)
    packed = words(rows, quantisation.bits)
    return {"codes": (columns, packed), "zeros": (groups, packed), "scales": (groups, rows)}


def _read_awq(quantisation: Quantisation, parts: Parts, rows: slice) -> LowBit:
    taken = _word_slice(rows, 4)
    packed = parts["codes"][:, taken].T  # (rows / 8, columns)
    # A byte of the layout holds two neighbours of a row, that is one nibble of two words. Four such
    # bytes at a time, from every second nibble: the lower ones, then the higher ones.
    even, odd = packed[:, 0::2].contiguous(), packed[:, 1::2].contiguous()
    low, high = (even & NIBBLES) | (odd & NIBBLES) << 4, (even >> 4 & NIBBLES) | (odd & ~NIBBLES)
    octets = _octets(torch.stack((low, high), 2)).unflatten(2, (2, 2, 2))
    # Nibble 4 i + 2 j + k of a word is that of row 4 j + 2 k + i of eight.
    codes = octets.permute(0, 4, 2, 3, 1).flatten(0, 3)
    dealt = _codes(parts["zeros"][:, taken], 4)  # the even ones of eight, then the odd ones
    zeros = dealt.unflatten(1, (-1, 2, 4)).mT.flatten(1).T
    return LowBit(codes, parts["scales"][:, rows].T, zeros)


def _gptq_shapes(quantisation: Quantisation, rows: int, columns: int) -> Shapes:
    bits = quantisation.bits
    groups = columns // (quantisation.group_size or columns)
    return {
        "codes": (words(columns, bits), rows),
        "zeros": (groups, words(rows, bits)),
        "scales": (groups, rows),
        "order": (columns,),
        "bias": (rows,),
    }


def _read_gptq(quantisation: Quantisation, parts: Parts, rows: slice) -> LowBit:
    bits = quantisation.bits
    octets = _octets(parts["codes"][:, rows].T)
    zeros = parts["zeros"][:, _word_slice(rows, bits)]
    if quantisation.storage == "gptq":
        # Files of the first version hold zeros less one. It was taken from whole words, with a
        # borrow where a zero was 0, so it is given back to whole words.
        zeros = zeros + (0x11111111 if bits == 4 else 0x01010101)
    zeros = _codes(zeros, bits)[:, : rows.stop - rows.start].T
    codes = octets if bits == 4 else _signed(octets)
    return LowBit(codes, parts["scales"][:, rows].T, zeros)


def _packed_shapes(quantisation: Quantisation, rows: int, columns: int) -> Shapes:
    bits = quantisation.bits
    groups = columns // (quantisation.group_size or columns)
    return {
        "codes": (rows, words(columns, bits)),
        "zeros": (words(rows, bits), groups),
        "order": (columns,),
        "shape": (2,),
    }


def _read_packed(quantisation: Quantisation, parts: Parts, rows: slice) -> LowBit:
    bits = quantisation.bits
    octets = _octets(parts["codes"][rows])
    zeros = parts.get("zeros")
    if zeros is not None:
        zeros = _codes(zeros[_word_slice(rows, bits)].T, bits)
        zeros = zeros[:, : rows.stop - rows.start].T
    codes = octets if bits == 4 else _signed(octets)
    return LowBit(codes, _by_row(parts["scales"], len(parts["codes"]))[rows], zeros)


def _plain_shapes(quantisation: Quantisation, rows: int, columns: int) -> Shapes:
    return {"codes": (rows, columns)}


def _read_plain(quantisation: Quantisation, parts: Parts, rows: slice) -> LowBit:
    stored = parts["codes"]
    codes, scales = stored[rows], _by_row(parts["scales"], len(stored))[rows]
    zeros = _by_row(parts["zeros"], len(stored))[rows] if "zeros" in parts else None
    if kind(quantisation) == INT4:  # -8 .. 7
        codes = pack((codes + 8).to(INT4))
        zeros = None if zeros is None else (zeros + 8).to(INT4)
    return LowBit(codes, scales, zeros)


def _ordered(quantisation: Quantisation) -> bool:
    return quantisation.act_order


def _shifted(quantisation: Quantisation) -> bool:
    return not quantisation.symmetric


def _never(quantisation: Quantisation) -> bool:
    return False


GPTQ = Format(
    {
        "codes": Role(("qweight",), ("I32",)),
        "scales": Role(("scales",), FLOATS),
        "zeros": Role(("qzeros",), ("I32",)),
        "order": Role(("g_idx",), ("I32",), _ordered),
        "bias": Role(("bias",), FLOATS, _never),
    },
    _gptq_shapes,
    _read_gptq,
)
FORMATS = {
    "awq": Format(
        {
            "codes": Role(("qweight",), ("I32",)),
            "scales": Role(("scales",), FLOATS),
            "zeros": Role(("qzeros",), ("I32",)),
        },
        _awq_shapes,
        _read_awq,
    ),
    "gptq": GPTQ,
    "gptq_v2": GPTQ,
    "packed": Format(
        {
            "codes": Role(("weight_packed",), ("I32",)),
            "scales": Role(("weight_scale",), FLOATS),
            "zeros": Role(("weight_zero_point",), ("I32",), _shifted),
            "order": Role(("weight_g_idx",), ("I32",), _ordered),
            "shape": Role(("weight_shape",), ("I64",), _never),
        },
        _packed_shapes,
        _read_packed,
    ),
    "plain": Format(
        {
            "codes": Role(("weight",), ("I8", "F8_E4M3")),
            # The last one is not inverted.
            "scales": Role(("weight_scale", "qscale_weight", "weight_scale_inv"), FLOATS),
            "zeros": Role(("weight_zero_point",), ("I8",), _shifted),
        },
        _plain_shapes,
        _read_plain,
    ),
}
# What a tensor of low-bit weights may be called, and no other is.
NAMES = {
    name
    for format in FORMATS.values()
    for spec in format.roles.values()
    for name in spec.names
    if name not in ("weight", "bias")
}

"""The layout of low-bit weights: small codes, and a scale for each group of a row.

    weight[o, i] = (code[o, i] - zero[o, i // group_size]) * scale[o, i // group_size]

A row of `in` weights is cut into groups of `group_size` neighbours; one group is the whole row
("per channel"). There are three kinds of codes, and `qweight`'s dtype tells which:

    bits  qweight, (..., out, ...)         codes      zeros                      without zeros
    4     uint8, two codes a byte, in / 2  0 .. 15    uint8, 0 .. 16             zero is 8
    8     int8, in                         any        int8                       zero is 0
    8     float8_e4m3fn, in                finite     None                       zero is 0

`scales` (and `zeros`) have shape (..., out, in / group_size); scales are float32, bfloat16 or
float16, whatever the dtype of x. Leading dimensions are experts. Of a 4-bit row, the even codes lie
in the low halves of the bytes, so that eight codes are a little-endian 32-bit word whose lowest
four bits come first, which is how compressed-tensors packs them:

    in        0    1    2    3    4    5    6    7  ...
    byte     [ 0: 1 | 0 ]  [ 1: 3 | 2 ]  [ 2: 5 | 4 ]  ...        (high half | low half)
    word     [ 7 | 6 | 5 | 4 | 3 | 2 | 1 | 0 ]                    (bit 31 ... bit 0)

`perm` (act-order): column i of the codes stands for column perm[i] of the weight, so that the
columns of a group are neighbours; the product gathers x[..., perm].

>>> codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
>>> [hex(byte) for byte in pack(codes).flatten().tolist()]
['0x21', '0x43', '0x65', '0x87']
>>> LowBit(pack(codes), torch.tensor([[0.5]])).dequantise(torch.float32).tolist()
[[-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments
from mistral_kernels.ops.dispatch import KERNEL_DTYPES, VECTOR_BYTES, Facts, address

INT4, INT8, FP8 = torch.uint8, torch.int8, torch.float8_e4m3fn  # dtypes of qweight
BITS = {INT4: 4, INT8: 8, FP8: 8}
ZERO = {INT4: 8, INT8: 0, FP8: 0}  # the code that stands for 0.0 where there are no zeros
GROUP_MULTIPLE = 16  # a group is so many columns, or a multiple, or the whole row
WORD = 8  # codes of a 32-bit word: a 4-bit row holds whole words
DTYPES = {INT8: 3, FP8: 4, INT4: 5}  # of csrc/dtype.h
CUDA_ROWS = 8  # kTileTokens of csrc/cuda/row_sums.cuh
CUDA_GROUP = 32  # CUDA's groups are so many columns, or a multiple, or the whole row
# What lies between the ends of symmetric codes, halved, as compressed-tensors counts it.
HALF_SPAN = {INT4: 7.5, INT8: 127.5, FP8: torch.finfo(FP8).max}


class LowBit(NamedTuple):
    """A weight in the layout above, its fields in the order in which the ops take them."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None

    @property
    def bits(self) -> int:
        return BITS[self.qweight.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (..., out, in)."""
        *leading, columns = self.qweight.shape
        return (*leading, columns * 2 if self.qweight.dtype == INT4 else columns)

    @property
    def group_size(self) -> int:
        return self.shape[-1] // max(1, self.scales.shape[-1])

    def part(self, *index: int | slice) -> LowBit:
        """Views of some experts, rows or both; the rows of a matrix share its perm."""
        *rows, perm = self
        parts = [tensor if tensor is None else tensor[index] for tensor in rows]
        return LowBit(*parts, perm if perm is None else perm[index[: perm.dim() - 1]])

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight, (..., out, in), its columns in their own order.

        Differences are exact; each product is rounded to float32 (to float64 for that dtype) and
        then to `dtype`. Of 4-bit and integer codes with 16-bit scales the float32 product is exact,
        so the weight is rounded once.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes = unpack(self.qweight) if self.qweight.dtype == INT4 else self.qweight
        # One group of a row is a row of this.
        codes = codes.to(wide).unflatten(-1, (self.scales.shape[-1], self.group_size))
        zeros = ZERO[self.qweight.dtype] if self.zeros is None else self.zeros[..., None].to(wide)
        weight = ((codes - zeros) * self.scales[..., None].to(wide)).flatten(-2).to(dtype)
        if self.perm is None:
            return weight
        columns = self.perm.long()[..., None, :].expand(weight.shape)
        return torch.empty_like(weight).scatter_(-1, columns, weight)


def pack(codes: Tensor) -> Tensor:
    """Packs 4-bit codes.

    Args:
        codes: (..., in), uint8 of 0 .. 15; `in` is even.

    Returns:
        (..., in / 2), uint8.
    """
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(qweight: Tensor) -> Tensor:
    """The inverse of `pack`: (..., in / 2) uint8 -> (..., in) uint8."""
    return torch.stack((qweight & 15, qweight >> 4), -1).flatten(-2)


def nearest_values(weight: Tensor, scales: Tensor, kind: torch.dtype) -> Tensor:
    """What symmetric codes can give that is nearest to a weight.

    Args:
        weight: float32, any shape.
        scales: those of the layout, one for each value, or a shape that broadcasts to that.
        kind: INT4, INT8 or FP8.

    Returns:
        code * scale, float32, weight's shape.
    """
    scales = scales.float()
    codes = weight / torch.where(scales == 0, 1, scales)
    if kind == FP8:
        limit = torch.finfo(FP8).max
        return codes.clamp_(-limit, limit).to(FP8).float().mul_(scales)
    most = HALF_SPAN[kind] - 0.5
    return codes.round_().clamp_(-most - 1, most).mul_(scales)


def round_to_codes(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, kind: torch.dtype
) -> LowBit:
    """The nearest codes for given scales, and zeros where there are some.

    Args:
        weight: (..., out, in), float32.
        scales: (..., out, in / group_size), as the layout will hold them.
        zeros: the same shape, dtype `kind`, or None.
        kind: dtype of the codes: INT4, INT8 or FP8.

    Returns:
        The weight in the layout; what lies beyond the largest code becomes that code.
    """
    groups = weight.unflatten(-1, (scales.shape[-1], -1))
    scale = scales[..., None].float()
    codes = (groups / torch.where(scale == 0, 1, scale)).flatten(-2)
    if kind == FP8:
        limit = torch.finfo(FP8).max
        return LowBit(codes.clamp(-limit, limit).to(FP8), scales)
    zero = ZERO[kind] if zeros is None else zeros.float().repeat_interleave(groups.shape[-1], -1)
    least, most = (0, 15) if kind == INT4 else (-128, 127)
    codes = codes.add_(zero).round_().clamp_(least, most).to(kind)
    return LowBit(pack(codes) if kind == INT4 else codes, scales, zeros)


def quantise(
    weight: Tensor, kind: torch.dtype, group_size: int | None = None, *, symmetric: bool = True
) -> LowBit:
    """Rounds a weight to nearest, each group's scale by its largest values.

    Args:
        weight: (..., out, in), float32, bfloat16 or float16, whose dtype the scales get.
        kind: INT4, INT8 or FP8.
        group_size: a divisor of `in`; None: the whole row.
        symmetric: no zeros; False (never for FP8): a group's least and largest value, and 0, lie
            between the ends of the codes.

    Returns:
        The weight in the layout.
    """
    groups = weight.float().unflatten(-1, (-1, group_size or weight.shape[-1]))
    if symmetric:
        scales = (groups.abs().amax(-1) / HALF_SPAN[kind]).to(weight.dtype)
        return round_to_codes(weight.float(), scales, None, kind)
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((most - least) / (2 ** BITS[kind] - 1)).to(weight.dtype)
    first = 0 if kind == INT4 else -128
    zeros = (first - least / torch.where(scales == 0, 1, scales).float()).round_()
    zeros = zeros.clamp_(first, first + 2 ** BITS[kind] - 1).to(kind)
    return round_to_codes(weight.float(), scales, zeros, kind)


def word_alignment(*qweights: Tensor) -> int:
    """Bytes, up to a word's four, on whose multiples all rows of codes begin."""
    return math.gcd(4, *(n for q in qweights for n in (q.data_ptr(), q.shape[-1])))


def triton_refuses(facts: dict[str, int]) -> str | None:
    """Why the Triton kernels, which read words, cannot serve a call."""
    alignment = facts.get("word_alignment", 4)
    return (
        None if alignment == 4 else f"it takes rows of codes on 4-byte boundaries, got {alignment}"
    )


def check_bits(check: Arguments, bits: int) -> None:
    check.integer("bits", bits, 1)
    if bits not in BITS.values():
        raise ValueError(f"{check.op}: bits must be 4 or 8, got {bits}")


def check_low_bit(
    check: Arguments,
    name: str,
    weight: LowBit,
    dims: tuple[str | int, ...],
    bits: int,
    group_size: int | None,
) -> None:
    """Checks one weight of an op.

    Args:
        check: of the call; the weight's columns must be bound already.
        name: of the weight, such as "w13"; "" where the tensors go by their own names.
        weight: the tensors.
        dims: names or numbers of the weight's dimensions, (..., out, in).
        bits, group_size: as the caller gave them; None: one group a row.

    Raises:
        TypeError, ValueError: something does not fit; op and argument are named.
    """
    names = [f"{name}_{field}".removeprefix("_") for field in ("scales", "zeros", "perm")]
    qweight = name or "qweight"
    check_bits(check, bits)
    check.is_tensor(qweight, weight.qweight)
    *leading, columns = dims
    in_dim = columns if isinstance(columns, int) else check.sizes[columns]
    if bits == 4 and in_dim % WORD:
        raise ValueError(
            f"{check.op}: 4-bit rows (of x and {qweight}) must be a multiple of {WORD},"
            f" got {columns}={in_dim}"
        )
    kinds = tuple(dtype for dtype in BITS if BITS[dtype] == bits)
    if weight.qweight.dtype not in kinds:
        expected, got = " or ".join(map(str, kinds)), weight.qweight.dtype
        raise TypeError(f"{check.op}: {qweight} must be {expected} for bits={bits}, got {got}")
    check.tensor(qweight, weight.qweight, (*leading, in_dim * bits // 8), kinds)
    size = in_dim if group_size is None else group_size
    check.integer("group_size", size, 1 if group_size is not None else 0)
    if group_size is not None and (in_dim % size or (size % GROUP_MULTIPLE and size != in_dim)):
        raise ValueError(
            f"{check.op}: group_size must divide {in_dim} and be a multiple of {GROUP_MULTIPLE},"
            f" got {size}"
        )
    groups = in_dim // max(1, size)
    check.tensor(names[0], weight.scales, (*leading, groups), KERNEL_DTYPES)
    if weight.zeros is not None:
        if weight.qweight.dtype == FP8:
            raise TypeError(f"{check.op}: {names[1]} must be None for {FP8}, got a tensor")
        check.tensor(names[1], weight.zeros, (*leading, groups), (weight.qweight.dtype,))
    if weight.perm is not None:
        check.tensor(names[2], weight.perm, (*leading[:-1], in_dim), (torch.int32,))
    for field, value in zip((qweight, *names), weight, strict=True):
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{check.op}: {field} must be contiguous, got {value.stride()}")


def launch_fields(weight: LowBit) -> tuple[int, ...]:
    """The weight as `low_bit` of csrc/bindings.cpp expects it."""
    return (
        *map(address, weight),
        max(1, weight.group_size),
        DTYPES[weight.qweight.dtype],
        KERNEL_DTYPES.index(weight.scales.dtype),
    )


def cuda_facts(x: Tensor, *weights: LowBit) -> Facts:
    """What the CUDA kernels ask of memory: how aligned all rows are, and all groups of columns."""
    sizes = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    steps = [step * x.element_size() for size, step in sizes if size > 1]
    codes = [number for w in weights for number in (w.qweight.data_ptr(), w.qweight.shape[-1])]
    # A whole row begins and ends where it may.
    groups = [w.group_size for w in weights if w.group_size != w.shape[-1]]
    return (
        ("alignment", math.gcd(VECTOR_BYTES, x.data_ptr(), *steps, *codes)),
        ("group_multiple", math.gcd(CUDA_GROUP, *groups)),
    )


def cuda_refuses(rows: str, facts: dict[str, int]) -> str | None:
    """Why the CUDA kernels cannot serve a call; `rows` is the name of the fact that counts x's."""
    if facts.get(rows, 1) > CUDA_ROWS:
        return f"it takes up to {CUDA_ROWS} {rows}, got {facts[rows]}"
    if facts.get("group_multiple", CUDA_GROUP) < CUDA_GROUP:
        return (
            f"it takes groups of whole rows or of a multiple of {CUDA_GROUP} columns,"
            f" got multiples of {facts['group_multiple']}"
        )
    if facts.get("alignment", VECTOR_BYTES) < VECTOR_BYTES:
        return f"it takes rows on {VECTOR_BYTES}-byte boundaries, got {facts['alignment']}"
    return None

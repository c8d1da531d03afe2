"""A low-bit weight as the kernels take it, and the tiles of products with it."""

from typing import NamedTuple

import torch

from mistral_kernels.kernels.processor import shared_bytes

FORMATS = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
BITS = {"int4": 4, "int8": 8, "fp8": 8}
FEW_ROWS = 32  # of a tile that has registers for anything


class Codes(NamedTuple):
    """A weight in the layout of `ops.low_bit`, all tensors contiguous."""

    format: str
    words: torch.Tensor  # (..., out, in * bits / 32), int32
    scales: torch.Tensor  # (..., out, groups), any float dtype
    zeros: torch.Tensor | None  # the same, uint8 or int8
    perm: torch.Tensor | None  # (..., in), int32

    @property
    def groups(self) -> int:
        return self.scales.shape[-1]

    @property
    def group_size(self) -> int:
        return self.words.shape[-1] * (32 // BITS[self.format]) // self.groups

    def span(self, block_k: int) -> int:
        """How many neighbours in steps of `block_k` share a scale; 0 if all of a row do."""
        return 0 if self.groups == 1 else span(self.group_size, block_k)


def span(group_size: int, block_k: int) -> int:
    """The largest power of two that divides a group and a step."""
    return min(group_size & -group_size, block_k)


def as_codes(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
) -> Codes:
    """The tensors of the layout as the kernels take them; rows of codes must be whole words."""
    return Codes(FORMATS[qweight.dtype], qweight.view(torch.int32), scales, zeros, perm)


def format_of(weight: torch.Tensor | Codes) -> str | None:
    """Of a low-bit weight its format, of any other None."""
    return weight.format if isinstance(weight, Codes) else None


def low_bit_arguments(weight: torch.Tensor | Codes, block_k: int) -> tuple[tuple, dict]:
    """What a kernel that takes either kind of weight wants.

    Returns:
        words or elements, scales, zeros, perm and group_size, each of which may be None; FORMAT and
        SPAN.
    """
    if isinstance(weight, Codes):
        tensors = weight.words, weight.scales, weight.zeros, weight.perm
        return (*tensors, weight.group_size), {
            "FORMAT": weight.format,
            "SPAN": weight.span(block_k),
        }
    return (weight, None, None, None, None), {"FORMAT": None, "SPAN": 0}


def rows_of_tile(rows: int, weight: torch.Tensor | Codes) -> int:
    """For how many of `rows` rows a tile is chosen; with a gather each number has an address."""
    gathered = isinstance(weight, Codes) and weight.perm is not None
    return min(rows, FEW_ROWS) if gathered else rows


def low_bit_tiles(
    rows: int, dtype: torch.dtype, arch: tuple[int, int], format: str, grouped: bool = False
) -> dict[str, int]:
    """Tiles for about `rows` rows at a time, on compute capability `arch`; not measured.

    Chosen by machine code: instructions a weight (of int4 in groups of 128 / of int8 in one), and
    spills. Up to 16 rows: 32 weight rows of 128 bytes a step, 6.7 / 6; with 64 rows of 128 int4
    codes Triton moves scales between threads, 8.3. Up to 32 rows: 128 of 128 codes, 8.4 / 6.4. More
    rows: as many as one unpacking may serve before the sums spill, 128 where a warp group
    multiplies them (sm_90: 8.6 / 7.3), 64 elsewhere (sm_80: 9.0 for int8; with four warps, each of
    which unpacks what another one does, 22). On sm_100 no tile has 64 rows: Triton 3.7 makes a trap
    of tcgen05's eight products; the experts' kernels would spill with four stages there, and with
    64 weight rows of float32, so that `linear_low_bit` does without them, too.

    grouped: for the experts' kernels, which hold more. Of 32 rows four warps would spill where
    there are zeros, eight take 9.6; of 64 rows eight would on sm_120.
    """
    ten = arch[0] == 10
    if dtype == torch.float32:  # no tensor cores: the sums of a thread are what limits
        block_m, block_n = (16, 32) if rows <= 16 else (32, 32 if ten else 64)
        block_k, num_warps = 128, 8
    elif rows <= 16:
        block_m, block_n, block_k, num_warps = 16, 32, 1024 // BITS[format], 2
    elif rows <= FEW_ROWS or ten or (grouped and arch[0] == 12):
        block_m, block_n, block_k, num_warps = FEW_ROWS, 128, 128, 8 if grouped else 4
    elif arch[0] == 9:
        block_m, num_warps = (64, 4) if rows <= 64 else (128, 8)
        block_n, block_k = 128, 128
    else:
        block_m, block_n, block_k, num_warps = 64, 128, 128, 8
    stage = block_k * (block_m * dtype.itemsize + block_n * BITS[format] // 8)
    room = shared_bytes(arch) // 2 // stage  # two programs of a multiprocessor share its memory
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "num_warps": num_warps,
        "num_stages": max(2, min(3 if ten else 4, room)),
    }


def weight_bytes(format: str, group_size: int) -> float:
    """Of a weight and its share of a scale of two bytes."""
    return BITS[format] / 8 + 2 / group_size


def codegen_arguments(
    format: str | None, group_size: int, in_dim: int, block_k: int, with_all: bool = False
) -> tuple[dict, dict]:
    """Types and constexprs of `low_bit_arguments` for `codegen_cases`; with_all: zeros and perm."""
    if format is None:
        names = ("scales_ptr", "zeros_ptr", "perm_ptr", "group_size")
        return dict.fromkeys(names, "constexpr"), {"FORMAT": None, "SPAN": 0}
    types = {"scales_ptr": "*bf16", "zeros_ptr": "*u8" if format == "int4" else "*i8"}
    types |= {"perm_ptr": "*i32"}
    if not with_all:
        types |= dict.fromkeys(("zeros_ptr", "perm_ptr"), "constexpr")
    return types, {
        "FORMAT": format,
        "SPAN": 0 if group_size == in_dim else span(group_size, block_k),
    }

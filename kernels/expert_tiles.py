"""How expert_mlp's grouped GEMMs are cut into tiles.

A row is one of the plan, and each expert's rows are cut into row tiles from its first row on, so no
tile has two experts. Rows 0 1 | 2 | 3 4 of three experts (the example of expert_plan), in tiles of
two rows, two column tiles, groups of two row tiles:

    row tiles          0: expert 0, rows 0 1    1: expert 1, row 2    2: expert 2, rows 3 4
    order (row, column)    (0, 0) (1, 0) (0, 1) (1, 1) | (2, 0) (2, 1)

Programs are persistent: as many as run at a time, program p of n takes tiles p, p + n and so on.
How many tiles there are is known on the device only; with a program a tile the grid would be the
host's bound, a row tile for each expert too many, and most of its programs would wait for a place.
Neighbours in the order run at the same time, so L2 has what they share (`tile_place`). Few tokens
need no plan: there a program has one tile, of one expert and all tokens.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.expert_plan import load_ids
from mistral_kernels.kernels.low_bit_codes import low_bit_tiles
from mistral_kernels.kernels.matrix_product import tile_place
from mistral_kernels.kernels.processor import processor, shared_bytes

FEW_TOKENS = 32  # up to here a program multiplies its expert with all tokens, and nothing is sorted


@triton.jit
def row_tiles(starts_ptr, experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """First and last row of each expert (the last one excluded), and how many tiles it has."""
    offs = tl.arange(0, EXPERTS)
    begin = tl.load(starts_ptr + offs, mask=offs < experts, other=0)
    end = tl.load(starts_ptr + offs + 1, mask=offs < experts, other=0)
    return begin, end, tl.cdiv(end - begin, BLOCK_M)


@triton.jit
def planned_tiles(starts_ptr, experts, tiles_n, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """How many tiles all experts have."""
    _, _, tiles = row_tiles(starts_ptr, experts, BLOCK_M, EXPERTS)
    return tl.sum(tiles) * tiles_n


@triton.jit
def planned_tile(
    tile,
    starts_ptr,
    experts,
    tiles_n,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two, at least experts
):
    """A tile's expert, rows, which of them count, column tile.

    Rows behind the expert's last are the last once more, so that what is looked up for a row needs
    no mask.
    """
    begin, end, tiles = row_tiles(starts_ptr, experts, BLOCK_M, EXPERTS)
    pid_m, pid_n = tile_place(tile, tl.sum(tiles), tiles_n, GROUP_M)
    ends = tl.cumsum(tiles, 0)  # tiles of all experts up to this one
    expert = tl.sum((ends <= pid_m).to(tl.int32))
    own = tl.arange(0, EXPERTS) == expert
    last = tl.sum(tl.where(own, end, 0)) - 1
    row = tl.sum(tl.where(own, begin + (pid_m - ends + tiles) * BLOCK_M, 0))
    row += tl.arange(0, BLOCK_M)
    return expert, tl.minimum(row, last), row <= last, pid_n


@triton.jit
def chosen_expert(
    expert_ids_ptr, place, pairs, top_k, experts, stride_ids_token, PAIRS: tl.constexpr
):
    """Without a plan, the expert at `place`: a pair if those are fewer than experts, or an expert.

    It is -1 if nobody chose the expert, or if an earlier pair did and so is its place.
    """
    offs = tl.arange(0, PAIRS)
    ids = load_ids(expert_ids_ptr, 0, pairs, top_k, stride_ids_token, PAIRS)
    by_pair = pairs < experts
    expert = tl.where(by_pair, tl.sum(tl.where(offs == place, ids, 0)), place)
    first = tl.min(tl.where(ids == expert, offs, PAIRS))
    owned = tl.where(by_pair, first == place, first < PAIRS)
    return tl.where(owned & (expert >= 0) & (expert < experts), expert, -1)


@triton.jit
def tiles_of_program(
    expert_ids_ptr,
    starts_ptr,
    tokens,
    top_k,
    experts,
    tiles_n,  # column tiles of the result
    stride_ids_token,
    FEW: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A program's first tile, the end of the tiles, and with FEW its expert.

    With FEW the tile is a column tile, and there is none if the program's place has no expert.
    """
    tile = tl.program_id(0)
    if FEW:
        place, pairs = tl.program_id(1), tokens * top_k
        expert = chosen_expert(
            expert_ids_ptr, place, pairs, top_k, experts, stride_ids_token, PAIRS
        )
        return tile, tile + (expert >= 0).to(tl.int32), expert
    else:
        return tile, planned_tiles(starts_ptr, experts, tiles_n, BLOCK_M, EXPERTS), -1


@triton.jit
def tile_rows(
    tile,
    own,  # the expert with FEW
    starts_ptr,
    tokens,
    experts,
    tiles_n,
    FEW: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile's expert, rows, which of them count, column tile.

    A row is one of the plan, or with FEW expert * tokens + token.
    """
    if FEW:
        offs = tl.arange(0, BLOCK_M)
        return own, own * tokens + tl.minimum(offs, tokens - 1), offs < tokens, tile
    else:
        return planned_tile(tile, starts_ptr, experts, tiles_n, BLOCK_M, GROUP_M, EXPERTS)


def expert_rows(tokens: int, top_k: int, experts: int, batch_invariant: bool) -> int:
    """For how many rows tiles are chosen where there is a plan; not measured.

    About twice the mean of an expert's: most experts fit into one tile and their weights are read
    once. batch_invariant: one tile for any number of tokens; wgmma takes 64 rows at least.
    """
    return 64 if batch_invariant else 2 * tokens * top_k // experts


def tiles_for(
    rows: int, dtype: torch.dtype, arch: tuple[int, int], format: str | None = None
) -> dict[str, int]:
    """Tiles for about `rows` rows at a time, on compute capability `arch`; not measured.

    format: of low-bit weights, whose tiles are `low_bit_tiles`; what follows is about the others.

    Up to 32 rows: 64 weight rows of 256 bytes a stage. Two programs fit on a multiprocessor and
    keep some 96 KB of weights on their way, twice what its bandwidth asks for. 128 x 256 is the
    widest tile whose sums fit into registers. Less where that would spill: BLOCK_K with mma, which
    keeps its operands in registers, too, columns on sm_100.
    """
    if format is not None:
        return low_bit_tiles(rows, dtype, arch, format, grouped=True)
    block_m = min(max(triton.next_power_of_2(rows), 16), 64 if dtype == torch.float32 else 128)
    if dtype == torch.float32:  # no tensor cores: the sums of a thread are what limits
        # 8 warps would spill on sm_100, 4 on sm_90.
        block_n, block_k, num_warps = 64, 32, 4 if arch[0] == 10 else 8
    elif block_m <= 32:
        block_n, block_k, num_warps = 64, 128, 4
    elif block_m == 64:
        block_n, block_k, num_warps = 128, 64 if arch[0] < 12 else 32, 4
    else:
        block_n = 128 if arch[0] == 10 else 256
        block_k, num_warps = 64 if arch[0] in (9, 10) else 32, 8
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    stages = 5 if block_k == 32 else 4
    return config | {"num_warps": num_warps, "num_stages": fitting(stages, config, dtype, arch)}


def stage_bytes(config: dict[str, int], dtype: torch.dtype) -> int:
    """Shared memory of a stage of `products`."""
    return (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * dtype.itemsize


def fitting(stages: int, config: dict[str, int], dtype: torch.dtype, arch: tuple[int, int]) -> int:
    """As many of the stages as shared memory has room for."""
    return min(stages, shared_bytes(arch) // stage_bytes(config, dtype))


def used_experts(tokens: int, top_k: int, experts: int) -> float:
    """How many experts random routing uses."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def result_rows(tokens: int, top_k: int, experts: int) -> float:
    """Rows that either GEMM writes: one a pair; of few tokens all, for each used expert."""
    each = used_experts(tokens, top_k, experts) if tokens <= FEW_TOKENS else top_k
    return tokens * each


def programs(x: torch.Tensor, config: dict[str, int]) -> int:
    """How many programs run on x's device at a time: what registers and shared memory allow."""
    if not x.is_cuda:
        return 2  # the interpreter runs them in turn
    arch, multiprocessors = processor(x.device)
    # mma does with a buffer less than there are stages. One program too many only waits.
    by_shared = shared_bytes(arch) // ((config["num_stages"] - 1) * stage_bytes(config, x.dtype))
    # A thread may hold 255 of a multiprocessor's 65,536 registers.
    return multiprocessors * max(min(by_shared, 8 // config["num_warps"]), 1)

"""Neighbours of a shipped tile configuration, and a way to run a kernel with one of them."""

import contextlib
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Numbers of a configuration that no size of a tensor prescribes.
TILES = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_FFN", "BLOCK_HEADS", "BLOCK_TOKENS")
TILES += ("GROUP_M",)
STAGES = ("num_stages", "STAGES")
FREE = (*TILES, "num_warps", *STAGES)
MAX_WARPS = 16
Config = dict[str, Any]
Move = dict[str, int]  # number of a configuration -> 1 for up, -1 for down


def moved(config: Config, move: Move) -> Config:
    """The configuration with some numbers doubled or halved, stages one more or less."""
    new = dict(config)
    for name, step in move.items():
        value = config[name]
        new[name] = value + step if name in STAGES else value * 2 if step > 0 else value // 2
    return new


def candidates(config: Config) -> list[Move]:
    """The moves to try, none at all first; at most two numbers move at a time."""
    steps = [(name, step) for name in FREE if name in config for step in (-1, 1)]
    pairs = (pair for pair in itertools.combinations(steps, 2) if pair[0][0] != pair[1][0])
    moves = [dict(move) for move in ((), *((step,) for step in steps), *pairs)]
    return [move for move in moves if _possible(moved(config, move))]


def _possible(config: Config) -> bool:
    return min(config.get(name, 1) for name in FREE) >= 1 and config["num_warps"] <= MAX_WARPS


def free_numbers(config: Config) -> str:
    """What a table shows of a configuration: BLOCK_N 64, num_warps 4"""
    return ", ".join(f"{name} {config[name]}" for name in FREE if name in config)


@contextlib.contextmanager
def configured(module: ModuleType, move: Move) -> Iterator[list[Config]]:
    """Moves what the tile_config of a kernel file returns; gives the list of what it returned.

    A file of several kernels may have a configuration of each; each stands in the list once.
    """
    shipped, used = module.tile_config, []

    def tile_config(*args, **kwargs) -> Config:
        config = moved(shipped(*args, **kwargs), move)
        if config not in used:
            used.append(config)
        return config

    module.tile_config = tile_config
    try:
        yield used
    finally:
        module.tile_config = shipped

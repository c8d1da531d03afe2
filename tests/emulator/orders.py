"""The orders in which the emulator runs blocks, warps and lanes; order.h says what each is."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

ORDERS = ("forward", "reverse", "shuffled", "interleaved")


@contextmanager
def ordered(library: str, order: str, seed: int = 0) -> Iterator[None]:
    """Launches of a built library (its file, loaded already) run in `order` in this block."""
    set_order = ctypes.CDLL(library).emulator_set_order
    set_order(ORDERS.index(order), ctypes.c_uint64(seed))
    try:
        yield
    finally:
        set_order(0, ctypes.c_uint64(0))

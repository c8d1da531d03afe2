"""Calls the kernels of selftest.cu or split_sum.cu in a built library, by ctypes."""

import ctypes
from pathlib import Path


def argument(value: object) -> object:
    return ctypes.c_void_p(value.data_ptr()) if hasattr(value, "data_ptr") else value


class Selftest:
    """The exported functions of a library as methods that take tensors, or what ctypes takes."""

    def __init__(self, library: Path) -> None:
        self.file = str(library)
        self.library = ctypes.CDLL(self.file)

    def __getattr__(self, name: str):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p

        def call(*args: object) -> None:
            pointers = [
                ctypes.c_void_p(a.data_ptr()) if hasattr(a, "data_ptr") else a for a in args
            ]
            if error := function(*pointers):
                raise RuntimeError(error.decode())

        return call

"""Checkpoints that torch.save wrote: zip files of tensors and a pickle, which could hold code.

They are read by torch's own restricted unpickler, which builds tensors and runs nothing.
"""

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

# What the unpickler and the zip reader raise on files that are cut, damaged or no tensors.
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Maps the tensors of a pickle; they are views of the file and take no memory.

    Args:
        path: a file that torch.save wrote in its zip format, as it does since torch 1.6.

    Returns:
        Key to tensor, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds anything but tensors under names; none of its
            code has run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: truncated, or not a zip file as torch.save writes them")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except DAMAGE as error:
        # torch's own text is a page on its settings, then the reason.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        raise ValueError(f"{path}: damaged, or holds more than tensors ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(state).__name__}")
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: expected names of tensors, got {key!r:.80}")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{path}: {key}: expected a tensor, got {type(tensor).__name__}")
    return state

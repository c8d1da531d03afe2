"""Which files a checkpoint consists of, and what their headers say.

A set of files is complete or refused: shards say how many they are, an index names them.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.pickles import load_pickle

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of low-bit weights; a pickle's tensors have these names, too.
CODE_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | CODE_DTYPES).items()}

SHARD = re.compile(r".+-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")


class Stored(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int | None  # of its first byte in the file, None in a pickle


def check_dtype(stored: Stored) -> None:
    """Raises a ValueError, naming file and key, unless the tensor's dtype can be read."""
    if stored.dtype not in DTYPES:
        raise ValueError(f"{stored.path}: {stored.key}: dtype {stored.dtype} is not supported")


def check_shape(stored: Stored, expected: tuple[int, ...]) -> None:
    """Raises a ValueError, naming file and key, unless the tensor has the shape expected."""
    if stored.shape != expected:
        raise ValueError(
            f"{stored.path}: {stored.key}: expected shape {expected}, got {stored.shape}"
        )


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Maps a safetensors file; its tensors are views of the mapping and take no memory.

    Args:
        path: the file.

    Yields:
        The open file; its tensors on the CPU.

    Raises:
        FileNotFoundError, PermissionError: there is no such file, or it may not be read.
        ValueError: the file is truncated, or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path.open("rb").close()  # safetensors would call a file without permission a missing one
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error
    with file:
        yield file


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Maps a safetensors file or a pickle, by its name.

    Args:
        path: the file.

    Yields:
        A function from key to tensor, a view of the mapping on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `open_safetensors` and `load_pickle`.
    """
    if path.suffix != ".safetensors":
        yield load_pickle(path).__getitem__
        return
    with open_safetensors(path) as file:
        yield file.get_tensor


@contextmanager
def open_at_need() -> Iterator[Callable[[Stored], Tensor]]:
    """Reads small tensors of many files, each opened at its first tensor and closed at the end.

    Yields:
        A function that takes what a header says of a tensor and returns it, a view of the mapping.
    """
    with ExitStack() as stack:
        files: dict[Path, Callable[[str], Tensor]] = {}

        def read(stored: Stored) -> Tensor:
            if stored.path not in files:
                files[stored.path] = stack.enter_context(open_tensors(stored.path))
            return files[stored.path](stored.key)

        yield read


def read_headers(paths: list[Path]) -> dict[str, Stored]:
    """What the headers of some files say of their tensors, in the order of the files' bytes.

    Args:
        paths: safetensors files, or pickles.

    Returns:
        Key to description.

    Raises:
        FileNotFoundError, ValueError: as `open_tensors`; or two files hold the same key.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        for stored in _read_header(path):
            if stored.key in found:
                raise ValueError(f"{path}: {stored.key}: also in {found[stored.key].path.name}")
            found[stored.key] = stored
    return found


def _read_header(path: Path) -> list[Stored]:
    if path.suffix != ".safetensors":
        tensors = load_pickle(path).items()
        dtypes = {key: DTYPE_NAMES.get(t.dtype, str(t.dtype)) for key, t in tensors}
        return [Stored(path, k, tuple(t.shape), dtypes[k], t.nbytes, None) for k, t in tensors]
    with open_safetensors(path), path.open("rb") as file:  # the former checks the header
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    found = []
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape, offset = tuple(entry["shape"]), 8 + size + begin
        found.append(Stored(path, key, shape, entry["dtype"], end - begin, offset))
    return found


def read_into(target: Tensor, stored: Stored) -> bool:
    """Reads a tensor from its file straight into memory.

    The system reads ahead of this, but not of copying from a mapping, which takes longer if the
    file is not in the page cache yet.

    Args:
        target: where to.
        stored: a tensor of the same number of elements.

    Returns:
        Whether that was possible, or else nothing was done: the target must have the stored dtype
        and be contiguous on the CPU.

    Raises:
        ValueError: the file is shorter than it was.
    """
    same = DTYPES.get(stored.dtype) == target.dtype and target.is_contiguous()
    if stored.offset is None or not same or target.device.type != "cpu":
        return False
    left = memoryview(target.detach().view(-1).view(torch.uint8).numpy())
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        while left:
            count = file.readinto(left)
            if not count:
                raise ValueError(f"{stored.path}: {stored.key}: the file ends before the tensor")
            left = left[count:]
    return True


def native_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weight files of a Mistral-native folder.

    One `consolidated.safetensors` wins over shards, and those over `consolidated.NN.pth`, or `.pt`
    as the first Mixtral release has them.

    Args:
        folder: the checkpoint.
        allow_pickle: whether pickles may be read.

    Returns:
        The files, all of them present.

    Raises:
        FileNotFoundError: there is none, or a shard is missing; it is named.
        ValueError: shards of two sets, or only pickles and they are not allowed.
    """
    single = folder / "consolidated.safetensors"
    if single.exists():
        return [single]
    shards = sorted(folder.glob("consolidated-*-of-*.safetensors"))
    if shards:
        return _whole_set(folder, shards)
    pickles = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    pickles = pickles or sorted(folder.glob("consolidated.[0-9][0-9].pt"))
    if not pickles:
        raise _nothing(folder, "consolidated*.safetensors")
    names = {pickle.name for pickle in pickles}
    for number, pickle in enumerate(pickles):
        expected = f"consolidated.{number:02}{pickle.suffix}"
        if expected not in names:
            raise FileNotFoundError(f"{folder / expected}: missing beside {pickle.name}")
    return _allowed(pickles, allow_pickle)


def huggingface_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weight files of a Hugging Face folder: one, or those that the index names.

    Safetensors win over `pytorch_model*.bin`; arguments, result and errors as `native_files`.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        files = [single] if single.exists() else []
        if not files and index.exists():
            files = _indexed(index, suffix)
        if files:
            return files if suffix == ".safetensors" else _allowed(files, allow_pickle)
        for shard in sorted(folder.glob(f"{stem}-*-of-*{suffix}")):
            raise FileNotFoundError(f"{index}: missing beside {shard.name}")
    raise _nothing(folder, "model.safetensors or its index")


def _whole_set(folder: Path, shards: list[Path]) -> list[Path]:
    """The shards of one set, if their numbers are 1 to the total in their names."""
    names = {shard.name for shard in shards}
    for shard in shards:
        match = SHARD.fullmatch(shard.name)
        if not match or match["total"] != shards[0].stem.rpartition("-")[2]:
            raise ValueError(f"{shard}: not a shard of one set with {shards[0].name}")
    total, digits = int(match["total"]), len(match["number"])
    for number in range(1, total + 1):
        expected = f"consolidated-{number:0{digits}}-of-{match['total']}.safetensors"
        if expected not in names:
            raise FileNotFoundError(
                f"{folder / expected}: missing, with {len(names)} of {total} shards there"
                + _unfinished(folder)
            )
    return shards


def _indexed(index: Path, suffix: str) -> list[Path]:
    """The files that an index names; they lie beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: expected an object, got {weight_map!r:.80}")
    for key, name in weight_map.items():
        # A plain name cannot lead out of the folder; links are followed, as hub caches use them.
        if not isinstance(name, str) or not re.fullmatch(rf"[\w.-]+\{suffix}", name):
            raise ValueError(
                f"{index}: {key}: expected the name of a {suffix} file in the folder, "
                f"got {name!r:.80}"
            )
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            unfinished = _unfinished(index.parent)
            raise FileNotFoundError(f"{file}: no such file, but {index.name} names it{unfinished}")
    return files


def _allowed(pickles: list[Path], allow_pickle: bool) -> list[Path]:
    if not allow_pickle:
        raise ValueError(
            f"{pickles[0]}: a pickle, which could hold code; it is read, without running any,"
            " with allow_pickle=True (on the command line --allow-pickle)"
        )
    return pickles


def _nothing(folder: Path, wanted: str) -> FileNotFoundError:
    return FileNotFoundError(f"{folder}: holds no {wanted}{_unfinished(folder)}")


def _unfinished(folder: Path) -> str:
    """A clause on a download that was cut short, as huggingface_hub leaves it; or nothing."""
    for place in (folder, folder / ".cache" / "huggingface" / "download"):
        for part in sorted(place.glob("*.incomplete")):
            return f"; a download is not finished, {part.relative_to(folder)} is left of it"
    return ""

"""One low-bit matrix in the files: its tensors found and checked, and its way into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.checkpoint_files import DTYPES, Stored, check_shape, open_tensors
from mistral_kernels.model.low_bit_files import FORMATS, Parts, kind, scale_grid
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.page_advice import Advice, advise
from mistral_kernels.model.quantisation import Quantisation
from mistral_kernels.ops.low_bit import FP8, INT4, WORD, ZERO, LowBit, pack, unpack

CHUNK = 1 << 21  # weights that are converted at a time; the rest of a matrix waits in its file


class StoredLowBit(NamedTuple):
    """The tensors of one matrix, checked; `perm` is the layout's, None if columns are in order."""

    quantisation: Quantisation
    shape: tuple[int, int]
    parts: dict[str, Stored]  # by role
    form: LowBitForm
    perm: Tensor | None

    @property
    def path(self):
        return self.parts["codes"].path

    @property
    def key(self) -> str:
        return self.parts["codes"].key

    @property
    def offset(self) -> int | None:
        return self.parts["codes"].offset

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def copy_to(self, target: Tensor | LowBit, read: Callable[[str], Tensor]) -> None:
        """Writes the matrix: its codes, or in full where the target is a plain tensor.

        Args:
            target: (rows, columns), of any floating dtype, or of this matrix's form; any device.
            read: the tensors of the file that holds the codes.

        Raises:
            ValueError: a code is NaN, a scale is not finite, or zeros are not those of a symmetric
                format; the file and key are named.
        """
        low_bit = isinstance(target, LowBit)
        device = (target.qweight if low_bit else target).device
        tensors = self._tensors(read, device)
        if low_bit and target.perm is not None:
            columns = torch.arange(self.shape[1]) if self.perm is None else self.perm
            target.perm.copy_(columns)
        for rows in _chunks(self.shape):
            piece = self._rows(tensors, rows)
            if not low_bit:
                target[rows] = piece.dequantise(target.dtype)
                continue
            for part, new in zip(target[:3], piece[:3], strict=True):
                if part is not None:
                    part[rows] = new

    def _tensors(self, read: Callable[[str], Tensor], device: torch.device) -> Parts:
        """The tensors by role, views of the mapped file where they can be."""
        tensors = {}
        for role in self.parts.keys() & {"codes", "scales", "zeros"}:
            stored = self.parts[role]
            # Tensors of one matrix lie in one file, but where a shard ends between them.
            tensor = read(stored.key) if stored.path == self.path else _read_alone(stored)
            advise(tensor, Advice.READ_AHEAD)
            if role == "scales" and not tensor.isfinite().all():
                raise ValueError(f"{stored.path}: {stored.key}: holds values that are not finite")
            tensors[role] = tensor.to(device)
        return tensors

    def _rows(self, tensors: Parts, rows: slice) -> LowBit:
        """Some rows in the layout."""
        format = FORMATS[self.quantisation.storage]
        piece = format.read(self.quantisation, tensors, rows)
        # Kernels take NaN for the number that would come after the largest.
        if self.form.codes == FP8 and (piece.qweight.view(torch.uint8) & 0x7F == 0x7F).any():
            raise ValueError(f"{self.path}: {self.key}: holds codes that are NaN")
        if piece.zeros is not None and not self.form.zeros:
            stored = self.parts["zeros"]
            if (piece.zeros != ZERO[self.form.codes]).any():
                raise ValueError(
                    f"{stored.path}: {stored.key}: expected the zeros of a symmetric format"
                )
            piece = piece._replace(zeros=None)
        if self.perm is None:
            return piece
        perm = self.perm.to(piece.qweight.device)
        if self.form.codes == INT4:
            codes = pack(unpack(piece.qweight).index_select(1, perm))
        else:
            codes = piece.qweight.index_select(1, perm)
        return piece._replace(qweight=codes, perm=perm)


def _chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows, each but the last of a multiple of 8."""
    rows, columns = shape
    count = max(WORD, CHUNK // columns // WORD * WORD)
    for start in range(0, rows, count):
        yield slice(start, min(start + count, rows))


def _read_alone(stored: Stored) -> Tensor:
    """A tensor copied out of its file."""
    with open_tensors(stored.path) as read:
        return read(stored.key).clone()


def take_low_bit(
    found: dict[str, Stored],
    key: str,
    shape: tuple[int, ...],
    quantisation: Quantisation,
    read: Callable[[Stored], Tensor],
) -> StoredLowBit | None:
    """Takes the tensors of one matrix out of those that were found.

    Args:
        found: key to tensor; what belongs to the matrix is removed.
        key: of the matrix where it is not quantised, such as "layers.0.attention.wq.weight".
        shape: of the matrix.
        quantisation: how the checkpoint stores such matrices.
        read: reads a small tensor.

    Returns:
        The matrix; None if it is not quantised, then nothing was taken.

    Raises:
        ValueError: a tensor is missing, misshapen or of another dtype, or says that columns belong
            to groups in a way that the layout cannot express; file and key are named.
    """
    owner, dot, leaf = key.rpartition(".")
    if leaf != "weight" or len(shape) != 2:
        return None
    roles = FORMATS[quantisation.storage].roles
    parts = {
        role: found[owner + dot + name]
        for role, spec in roles.items()
        for name in spec.names
        if owner + dot + name in found
    }
    beside = [part for role, part in parts.items() if role not in ("codes", "bias")]
    codes = parts.get("codes")
    if not beside and (codes is None or codes.dtype in DTYPES):
        return None
    for role, spec in roles.items():
        if role not in parts and spec.needed(quantisation):
            name = " or ".join(spec.names)
            path = next(iter(parts.values())).path
            raise ValueError(f"{path}: {owner}.{name}: missing")
    for role, part in parts.items():
        _check_dtype(part, role, quantisation)
        del found[owner + dot + part.key.rpartition(".")[2]]
    groups = _check_shapes(parts, shape, quantisation)
    perm = _perm(parts["order"], shape[1], groups, read) if "order" in parts else None
    _check_small(parts, shape, read)
    form = LowBitForm(
        kind(quantisation),
        shape[1] // groups,
        DTYPES[parts["scales"].dtype],
        # GPTQ and old compressed-tensors store the zeros of symmetric codes as well.
        not quantisation.symmetric,
        perm is not None,
    )
    return StoredLowBit(quantisation, shape, parts, form, perm)


def _check_dtype(part: Stored, role: str, quantisation: Quantisation) -> None:
    expected = FORMATS[quantisation.storage].roles[role].dtypes
    if role == "codes" and quantisation.storage == "plain":
        expected = ("F8_E4M3",) if quantisation.floating else ("I8",)
    if part.dtype not in expected:
        raise ValueError(
            f"{part.path}: {part.key}: expected dtype {' or '.join(expected)} for {quantisation},"
            f" got {part.dtype}"
        )


def _check_shapes(
    parts: dict[str, Stored], shape: tuple[int, int], quantisation: Quantisation
) -> int:
    """Checks all shapes; returns how many groups a row has."""
    (rows, columns), codes, size = shape, parts["codes"], quantisation.group_size
    if size and columns % size:
        raise ValueError(
            f"{codes.path}: {codes.key}: {columns} columns are not a multiple of group_size {size}"
        )
    if quantisation.bits == 4 and columns % WORD:
        raise ValueError(
            f"{codes.path}: {codes.key}: {columns} columns are not a multiple of {WORD}"
        )
    expected = FORMATS[quantisation.storage].shapes(quantisation, rows, columns)
    for role, part in parts.items():
        if role in expected:
            check_shape(part, expected[role])
    groups = columns // (size or columns)
    scales = parts["scales"]
    if "scales" not in expected:
        row_blocks = rows // quantisation.block_rows if quantisation.block_rows else rows
        wanted = {(row_blocks, groups)} if size else {(1, 1), (rows, 1)}
        grid = scale_grid(scales.shape, shape)
        # Of fp8 without blocks in its configuration, only the scales themselves tell.
        if grid is None or (grid not in wanted and (size or quantisation.method != "fp8")):
            raise ValueError(
                f"{scales.path}: {scales.key}: expected {' or '.join(map(str, sorted(wanted)))}"
                f" scales for {shape}, got shape {scales.shape}"
            )
        groups = grid[1]
    if "zeros" in parts and "zeros" not in expected:
        check_shape(parts["zeros"], scales.shape)
    return groups


def _perm(
    stored: Stored, columns: int, groups: int, read: Callable[[Stored], Tensor]
) -> Tensor | None:
    """The order of columns that makes those of a group neighbours, None if they are already."""
    size = columns // groups
    order = read(stored).long()
    # All -1: compressed-tensors never set them.
    if torch.equal(order, torch.arange(columns) // size) or order.eq(-1).all():
        return None
    if order.min() < 0 or order.max() >= groups:
        raise ValueError(
            f"{stored.path}: {stored.key}: expected groups from 0 to {groups - 1}, got"
            f" {order.min().item()} to {order.max().item()}"
        )
    counts = torch.bincount(order, minlength=groups)
    if (counts != size).any():
        group = int((counts != size).nonzero()[0])
        raise ValueError(
            f"{stored.path}: {stored.key}: expected {size} columns in each group, got"
            f" {counts[group].item()} in group {group}"
        )
    return order.argsort(stable=True).int()


def _check_small(
    parts: dict[str, Stored], shape: tuple[int, int], read: Callable[[Stored], Tensor]
) -> None:
    """Checks what the tensors say that are read for that alone."""
    if "bias" in parts and read(parts["bias"]).any():
        raise ValueError(f"{parts['bias'].path}: {parts['bias'].key}: biases are not supported")
    if "shape" in parts:
        stored = parts["shape"]
        said = tuple(read(stored).tolist())
        if said != shape:
            raise ValueError(f"{stored.path}: {stored.key}: expected {shape}, got {said}")

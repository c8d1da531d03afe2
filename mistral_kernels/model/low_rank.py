"""The factors of one low-rank update, W += scaling * B @ A, from their file to the model's rows.

PEFT stores all experts of a layer in one pair of factors: the expert is the slow index of A's rows
and the fast index of B's columns. Two experts (e) of rank 3 (r):

    rows of A: e0r0 e0r1 e0r2 e1r0 e1r1 e1r2        columns of B: r0e0 r0e1 r1e0 r1e1 r2e0 r2e1

Source: https://arxiv.org/abs/2106.09685; peft 0.21.2, `ParamWrapper.get_delta_weight`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from mistral_kernels.model.checkpoint_files import Stored, check_dtype, check_shape
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.weight_table import Place, half_split_rows, interleaved_rows

# The matrices whose rows follow the rope layout, by both formats' names.
ROTATED = {"wq": "q_heads", "q_proj": "q_heads", "wk": "kv_heads", "k_proj": "kv_heads"}


class Update(NamedTuple):
    """W += scaling * b @ a of one matrix: a (rank, columns), b (rows, rank), on the CPU."""

    place: Place
    a: Tensor
    b: Tensor
    scaling: float


@dataclass
class Pair:
    """The two factors of a matrix, or of the stacked matrices of a layer's experts, in a file.

    Args:
        name: of what they change, without `.weight`.
        a, b: the factors.
        place: what they change, two-dimensional or (experts, rows, columns).
        scaling: factor of the update.
        rank: of one matrix; None: as A has it.
        transposed: the update is (B @ A)^T, as PEFT has it for embeddings.
    """

    name: str
    a: Stored
    b: Stored
    place: Place
    scaling: float
    rank: int | None = None
    transposed: bool = False

    def check(self) -> None:
        """Raises a ValueError, naming file and key, unless the factors fit what they change."""
        experts, inputs, outputs = self._sizes()
        rows = self.rank * experts if self.rank else max((1, *self.a.shape[:1]))
        check_shape(self.a, (rows, inputs))
        check_shape(self.b, (outputs, rows))

    def load(self, file: safe_open, config: ModelConfig, *, interleaved: bool) -> list[Update]:
        """Reads the factors, which `check` has passed.

        Args:
            file: the file that holds them.
            config: the model.
            interleaved: the rope layout of the file, which the model's may differ from.

        Returns:
            One update, or one for every expert.

        Raises:
            ValueError: a factor holds a value that is not finite.
        """
        experts, inputs, outputs = self._sizes()
        a, b = (_finite(file, stored) for stored in (self.a, self.b))
        heads = getattr(config, ROTATED.get(self.name.rpartition(".")[2], ""), None)
        if heads and interleaved != config.interleaved:
            b = half_split_rows(b, heads) if interleaved else interleaved_rows(b, heads)
        a = a.reshape(experts, -1, inputs)
        b = b.reshape(outputs, -1, experts).permute(2, 0, 1)
        if self.transposed:
            a, b = b.mT, a.mT
        if len(self.place.shape) == 2:
            return [Update(self.place, a[0], b[0], self.scaling)]
        places = [Place(self.place.parameter, (e,), self.place.shape[1:]) for e in range(experts)]
        return [Update(place, a[e], b[e], self.scaling) for e, place in enumerate(places)]

    def _sizes(self) -> tuple[int, int, int]:
        """Experts, inputs of A and outputs of B, as the place asks for them."""
        *experts, rows, columns = self.place.shape
        inputs, outputs = (rows, columns) if self.transposed else (columns, rows)
        return math.prod(experts), inputs, outputs


def check_pairs(factors: Mapping[str, Mapping[str, Stored]], file: Path) -> None:
    """Raises a ValueError, naming file and key, unless all factors come in pairs that can be read.

    Args:
        factors: name of a matrix to its factors by "A" and "B".
        file: that holds them.
    """
    for pair in factors.values():
        for stored in pair.values():
            check_dtype(stored)
        for factor, other in ("AB", "BA"):
            if factor not in pair:
                key = pair[other].key.replace(f"_{other}", f"_{factor}")
                raise ValueError(f"{file}: {key}: missing")


def _finite(file: safe_open, stored: Stored) -> Tensor:
    """A factor, copied out of its file, which may be replaced while the adapter is loaded."""
    factor = file.get_tensor(stored.key).clone()
    if not factor.isfinite().all():
        raise ValueError(f"{stored.path}: {stored.key}: holds values that are not finite")
    return factor

"""What one forward call feeds: which packed rows decode, which prefill, and at which positions.

With a cache, sequences that feed one token go to decode_attention and longer ones to
prefill_attention; without one, all go to prefill_attention. All index tensors of a step live in one
int32 buffer, so that a GPU gets them in a single copy.

Three sequences with 4, 0 and 9 tokens in the cache feed 1, 3 and 0 tokens:

>>> step = plan_step([1, 3, 0], [4, 0, 9], [0, 0, 0], True, torch.device("cpu"))
>>> step.decode.rows.tolist(), step.decode.sequences.tolist(), step.decode.positions.tolist()
([0], [0], [4])
>>> step.prefill.rows.tolist(), step.prefill.cu_seqlens.tolist(), step.prefill.positions.tolist()
([1, 2, 3], [0, 3], [0, 1, 2])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ALL = slice(None)


class DecodeRows(NamedTuple):
    """Sequences that feed one token."""

    rows: Tensor | slice  # their packed rows
    sequences: Tensor | slice  # their places in the cache
    positions: Tensor  # (rows,)
    starts: Tensor | None


class PrefillRows(NamedTuple):
    """Sequences that feed several tokens."""

    rows: Tensor | slice
    sequences: Tensor | slice
    positions: Tensor  # (rows,)
    starts: Tensor | None
    cu_seqlens: Tensor  # (sequences + 1,), offsets within `rows`
    context_lens: Tensor  # (sequences,), tokens in the cache before this step


class Step(NamedTuple):
    last_rows: Tensor | slice  # (batch,), the last packed row of each sequence, -1 if it feeds none
    decode: DecodeRows | None
    prefill: PrefillRows | None
    # (T,), of a step with idle rows, whose positions are < 0: they are sent to no expert
    positions: Tensor | None = None


def plan_step(
    seqlens: Sequence[int],
    lengths: Sequence[int],
    starts: Sequence[int],
    cached: bool,
    device: torch.device,
) -> Step:
    """Plans a step in which sequence b feeds seqlens[b] tokens after lengths[b] earlier ones."""
    offsets = [0, *accumulate(seqlens)]
    groups = {
        "decode": [b for b, n in enumerate(seqlens) if cached and n == 1],
        "prefill": [b for b, n in enumerate(seqlens) if n > 1 or (n == 1 and not cached)],
    }
    fields: dict[str, list[int]] = {}
    if any(n != 1 for n in seqlens):
        ends = zip(seqlens, offsets[1:], strict=True)
        fields["last_rows"] = [end - 1 if n else -1 for n, end in ends]
    for name, group in groups.items():
        if not group:
            continue
        if len(group) < len(seqlens):  # else no gather is needed
            rows = [row for b in group for row in range(offsets[b], offsets[b + 1])]
            fields[f"{name}.rows"] = rows
            fields[f"{name}.sequences"] = group
        spans = [range(lengths[b], lengths[b] + seqlens[b]) for b in group]
        fields[f"{name}.positions"] = [position for span in spans for position in span]
        if any(starts):
            fields[f"{name}.starts"] = [starts[b] for b in group]
        if name == "prefill":
            fields["prefill.cu_seqlens"] = [0, *accumulate(seqlens[b] for b in group)]
            fields["prefill.context_lens"] = [lengths[b] for b in group]
    on_device = _one_copy(fields, device)

    def select(name: str) -> dict:
        return {
            "rows": on_device.get(f"{name}.rows", ALL),
            "sequences": on_device.get(f"{name}.sequences", ALL),
            "positions": on_device[f"{name}.positions"],
            "starts": on_device.get(f"{name}.starts"),
        }

    decode = DecodeRows(**select("decode")) if groups["decode"] else None
    prefill = None
    if groups["prefill"]:
        ragged = (on_device["prefill.cu_seqlens"], on_device["prefill.context_lens"])
        prefill = PrefillRows(**select("prefill"), cu_seqlens=ragged[0], context_lens=ragged[1])
    return Step(on_device.get("last_rows", ALL), decode, prefill)


def _one_copy(fields: dict[str, list[int]], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cpu":  # nothing is copied
        return {
            name: torch.tensor(values, dtype=torch.int32, device=device)
            for name, values in fields.items()
        }
    values = [value for field in fields.values() for value in field]
    on_host = torch.tensor(
        values, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
    )
    pieces = on_host.to(device, non_blocking=True).split([len(field) for field in fields.values()])
    return dict(zip(fields, pieces, strict=True))

"""Which of the model's weights can stay in few bits, and as what.

The model joins matrices that the files hold apart: wq, wk and wv; w1 and w3; all experts of a
layer. They stay in few bits if all of them are stored alike. Where they are not, and where the
files quantise what the model keeps in full, the weight is widened as it is loaded.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from mistral_kernels.model.checkpoint_files import Stored
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.stored_low_bit import StoredLowBit
from mistral_kernels.model.weight_table import Place
from mistral_kernels.ops.low_bit import GROUP_MULTIPLE

LOW_BIT = ("wqkv", "wo", "w13", "w2")
Sources = list[tuple[Stored | StoredLowBit, Place]]


def joined_forms(
    pairs: Iterable[tuple[Stored | StoredLowBit, Place]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, LowBitForm], dict[str, str]]:
    """The forms of a checkpoint's weights.

    Args:
        pairs: every tensor or low-bit matrix of the files, and its place.
        shapes: name to shape of the parameters.

    Returns:
        Name to form of the parameters that stay in few bits; and name to reason of those that have
        low-bit matrices and do not, by which the matrices in question are named.
    """
    by_parameter: dict[str, Sources] = defaultdict(list)
    for source, place in pairs:
        by_parameter[place.parameter].append((source, place))
    forms: dict[str, LowBitForm] = {}
    widened: dict[str, str] = {}
    for name, sources in by_parameter.items():
        if not any(isinstance(source, StoredLowBit) for source, _ in sources):
            continue
        reason = _difference(name, sources)
        if reason:
            widened[name] = reason
        else:
            perm = any(source.form.perm for source, _ in sources)
            forms[name] = sources[0][0].form._replace(perm=perm)
    for name in [name for name in shapes if name.endswith(".w2") and len(shapes[name]) == 3]:
        up = name.removesuffix("w2") + "w13"
        reason = _unlike(name, up, forms, shapes)
        if reason:
            for expert_weight in (up, name):
                if forms.pop(expert_weight, None):
                    widened[expert_weight] = reason
    return forms, widened


def _difference(name: str, sources: Sources) -> str | None:
    """Why the matrices of one parameter cannot be one low-bit weight; None if they can."""
    first, _ = sources[0]
    if name.rpartition(".")[2] not in LOW_BIT:
        return f"{first.key} is of a kind that is kept in full"
    perms: dict[tuple, StoredLowBit] = {}
    for source, place in sources:
        if not isinstance(source, StoredLowBit) or not isinstance(first, StoredLowBit):
            return f"of {first.key} and {source.key} one is quantised, one is not"
        if source.form._replace(perm=False) != first.form._replace(perm=False):
            return f"{first.key} and {source.key} are not stored alike"
        size = source.form.group_size
        if size % GROUP_MULTIPLE and size != source.shape[1]:
            return f"groups of {size} columns, no multiple of {GROUP_MULTIPLE}, in {first.key}"
        expert = place.index[:-1]  # the rest is the rows
        other = perms.setdefault(expert, source)
        if not _same(source.perm, other.perm):
            return f"{other.key} and {source.key} have their columns in different orders"
    return None


def _unlike(
    down: str, up: str, forms: dict[str, LowBitForm], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why w2 and w13 of the experts cannot go to one op; None if they can, or both are plain."""
    pair = [forms.get(up), forms.get(down)]
    if pair == [None, None]:
        return None
    if None in pair:
        return f"of {up} and {down} one is quantised, one is not"
    whole = all(
        form.group_size == shapes[name][-1] for form, name in zip(pair, (up, down), strict=True)
    )
    alike = {(form.codes, form.scales, whole or form.group_size) for form in pair}
    return f"{up} and {down} are not stored alike" if len(alike) > 1 else None


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)

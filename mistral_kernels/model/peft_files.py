"""The tensors of PEFT's `adapter_model.safetensors`, paired with the matrices that they change.

Keys are those of the adapted Hugging Face layers. Experts are named one by one, as in published
Mixtral checkpoints, or stacked, as transformers 5 holds them: their two matrices are parameters of
one layer, so PEFT tells them apart by wrapping alone (`experts.lora_A`, and inside of it
`experts.base_layer.lora_A`). Which is which, the shapes say.

Source: peft 0.17 to 0.21, `ParamWrapper` and `get_peft_model_state_dict`.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from mistral_kernels.model.checkpoint_files import Stored, check_dtype, check_shape, read_headers
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.low_rank import Pair, check_pairs
from mistral_kernels.model.peft_settings import PeftSettings
from mistral_kernels.model.weight_table import Place, huggingface_table
from mistral_kernels.model.weights import UNUSED

logger = logging.getLogger("mistral_kernels")

FACTOR_KEY = re.compile(
    r"(base_model\.model\.)?(?P<layer>.+?)(?P<wrapping>(\.base_layer)*)"
    r"\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.default)?(?(embedding)|\.weight)"
)
# PEFT puts a copy of the base's matrix beside adapted or resized embeddings.
COPY_KEY = re.compile(r"(base_model\.model\.)?(?P<layer>.+?)(\.base_layer)?\.weight")
# Multimodal models name their text part `language_model.model.` or `model.language_model.`.
TEXT_PART = re.compile(r"^language_model\.|(?<=^model\.)language_model\.")
EXPERTS = ("gate_up_proj", "down_proj")


class Copy(NamedTuple):
    """A whole matrix in an adapter's file, and the one of the model that it must equal."""

    stored: Stored
    place: Place


def peft_pairs(file: Path, config: ModelConfig) -> tuple[list[Pair], list[Copy], str | None]:
    """Pairs the factors in a file with the matrices they change; what does not fit is refused.

    Args:
        file: the tensors; `adapter_config.json` lies beside it.
        config: the model.

    Returns:
        The pairs, the whole matrices in the file, and the model that the adapter was made for.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`.
    """
    settings = PeftSettings.from_folder(file.parent)
    tables = (huggingface_table(config, stacked=stacked) for stacked in (False, True))
    matrices = {
        key.removesuffix(".weight"): place
        for table in tables
        for key, place in table.items()
        if len(place.shape) > 1
    }
    factors, copies = _sorted_tensors(file, matrices)
    check_pairs(factors, file)
    if config.tied_embeddings and any("embed_tokens" in name for name in factors):
        raise ValueError(f"{file}: embed_tokens: the output is tied to it and would change as well")
    names = _stacked_names(factors, matrices)
    pairs = []
    for wrapped, pair in factors.items():
        name, transposed = names.get(wrapped, (wrapped, ".lora_embedding_" in pair["A"].key))
        rank, scaling = settings.of_matrix(name)
        place = matrices[TEXT_PART.sub("", name)]
        pairs.append(Pair(name, pair["A"], pair["B"], place, scaling, rank, transposed))
    return pairs, copies, settings.base


def _sorted_tensors(
    file: Path, matrices: dict[str, Place]
) -> tuple[dict[str, dict[str, Stored]], list[Copy]]:
    """The factors in a file by the layer's name with its wrapping, and the copies of matrices."""
    factors: dict[str, dict[str, Stored]] = {}
    copies, of_vision = [], []
    for key, stored in read_headers([file]).items():
        match = FACTOR_KEY.fullmatch(key) or COPY_KEY.fullmatch(key)
        layer = match["layer"] if match else key
        if UNUSED.fullmatch(layer):
            of_vision.append(key)
            continue
        name = TEXT_PART.sub("", layer)
        is_copy = match is not None and match.re is COPY_KEY
        wrapping = "" if match is None or is_copy else match["wrapping"]
        stacked = f"{name}.{EXPERTS[0]}" in matrices and not is_copy
        if match is None or not (stacked or (name in matrices and not wrapping)):
            raise ValueError(f"{file}: {key}: not an adapter of a matrix of this model")
        if is_copy:
            check_dtype(stored)
            check_shape(stored, matrices[name].shape)
            copies.append(Copy(stored, matrices[name]))
            continue
        pair = factors.setdefault(layer + wrapping, {})
        if match["factor"] in pair:
            raise ValueError(f"{file}: {key}: stored twice, also as {pair[match['factor']].key}")
        pair[match["factor"]] = stored
    if of_vision:
        skipped = "%s: skipped %d tensors that a text model does not use, such as %s"
        logger.info(skipped, file, len(of_vision), of_vision[0])
    return factors, copies


def _stacked_names(
    factors: dict[str, dict[str, Stored]], matrices: dict[str, Place]
) -> dict[str, tuple[str, bool]]:
    """Which stacked experts each pair of a layer of experts changes, and whether transposed.

    Before 0.19.1 PEFT took the rows of stacked matrices for inputs, so that its update is
    (B @ A)^T. A file is of one kind; where ffn_dim is hidden or half of it and only one of the two
    matrices is adapted, both kinds fit and the newer is taken, as PEFT itself does.
    """
    layers = {wrapped: wrapped.replace(".base_layer", "") for wrapped in factors}
    stacked = {
        wrapped: layer
        for wrapped, layer in layers.items()
        if f"{TEXT_PART.sub('', layer)}.{EXPERTS[0]}" in matrices
    }
    misfit = ""
    for transposed in (False, True):
        names = {}
        for wrapped, layer in stacked.items():
            a, b = factors[wrapped]["A"], factors[wrapped]["B"]
            for leaf in EXPERTS:
                *_, rows, columns = matrices[f"{TEXT_PART.sub('', layer)}.{leaf}"].shape
                sides = (rows, columns) if transposed else (columns, rows)
                if (*a.shape[1:], *b.shape[:1]) == sides:
                    names[wrapped] = (f"{layer}.{leaf}", transposed)
            if wrapped not in names:
                misfit = misfit or (
                    f"{a.path}: {a.key}: shapes {a.shape} of A and {b.shape} of B fit neither"
                    f" {' nor '.join(EXPERTS)}"
                )
        if len(names) == len(stacked):
            return names
    raise ValueError(misfit)

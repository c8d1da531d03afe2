"""Writing a checkpoint folder, in either layout, whatever layout the model was read from."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.config_writing import huggingface_config, native_params
from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.layouts import CONFIG_FILES, Layout
from mistral_kernels.model.new_folder import check_new_folder, new_folder
from mistral_kernels.model.progress_bar import byte_bar
from mistral_kernels.model.weight_views import WeightView, weight_views
from mistral_kernels.model.weights import check_parameters
from mistral_kernels.ops.checks import is_int

logger = logging.getLogger("mistral_kernels")

# As published: one file, or numbered shards beside an index.
WEIGHT_FILES = {
    "native": "consolidated{suffix}.safetensors",
    "huggingface": "model{suffix}.safetensors",
}

# What a checkpoint folder holds besides, in either layout, and every layout needs.
TOKENIZER_FILES = (
    "tekken.json",
    "tokenizer.model*",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
)

# What may be lost when a folder is overwritten. An adapter or a README is none of it.
REPLACEABLE = (
    *CONFIG_FILES.values(),
    *TOKENIZER_FILES,
    *(name.format(suffix=end) for name in WEIGHT_FILES.values() for end in ("", "-*-of-*")),
    *(f"{name.format(suffix='')}.index.json" for name in WEIGHT_FILES.values()),
)


def save_checkpoint(
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    layout: Layout,
    max_shard_bytes: int,
    overwrite: bool,
    source: Path | None,
) -> None:
    """Writes a model to a folder, all of it or nothing.

    Args:
        parameters: name to tensor, as `parameter_shapes(config)` has them.
        config: the model, of either rope layout.
        folder: where; made if absent.
        layout: "native" or "huggingface".
        max_shard_bytes: most bytes of tensors a file, unless one tensor alone is larger.
        overwrite: replace the checkpoint that the folder holds.
        source: the folder that the model was read from, whose tokenizer files are copied.

    Raises:
        TypeError, ValueError: an argument is out of range, or the layout's configuration file
            cannot express the model.
        OSError: the folder is not empty, is no folder, or could not be written. Then, as after
            any other error, nothing is left behind and what was there is untouched.
    """
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    if layout not in CONFIG_FILES:
        raise ValueError(f"layout: expected 'native' or 'huggingface', got {layout!r}")
    if not isinstance(overwrite, bool):
        raise TypeError(f"overwrite: expected a bool, got {type(overwrite).__name__}")
    if not is_int(max_shard_bytes):
        name = type(max_shard_bytes).__name__
        raise TypeError(f"max_shard_bytes: expected an int, got {name}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected >= 1, got {max_shard_bytes}")
    check_parameters(parameters, config)
    if layout == "native":
        settings = native_params(config)
    else:
        dtype = parameters["tok_embeddings"].dtype
        settings = huggingface_config(config, dtype=dtype) | token_ids(source)
    target = check_new_folder(Path(folder), overwrite, REPLACEABLE)
    try:
        with new_folder(target, overwrite, REPLACEABLE) as new:
            write_json(new / CONFIG_FILES[layout], settings)
            for path in files_beside(source):
                shutil.copyfile(path, new / path.name)
            views = weight_views(parameters, config, layout)
            _write_weights(new, views, WEIGHT_FILES[layout], max_shard_bytes)
    except (OSError, SafetensorError) as error:
        kind = type(error) if isinstance(error, OSError) else OSError
        raise kind(f"{folder}: not saved ({error})") from error


def _write_weights(
    folder: Path, views: dict[str, WeightView], pattern: str, max_shard_bytes: int
) -> None:
    """Writes all tensors, shard by shard; the index only where there are several shards."""
    split = split_state_dict_into_shards_factory(
        views,
        get_storage_size=lambda view: view.nbytes,
        filename_pattern=pattern,
        max_shard_size=max_shard_bytes,
    )
    mode = next(folder.iterdir()).stat().st_mode  # of an ordinary new file
    with byte_bar("saving") as progress:
        bar = progress.add_task("", total=split.metadata["total_size"])
        for name, keys in split.filename_to_tensors.items():
            # Views of the model's memory; only reordered wq and wk are copies, a shard's at most.
            shard = {key: views[key].read().detach().contiguous() for key in keys}
            save_file(shard, folder / name, metadata={"format": "pt"})
            # safetensors lets nobody but the owner read its files.
            (folder / name).chmod(mode)
            progress.advance(bar, sum(tensor.nbytes for tensor in shard.values()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{pattern.format(suffix='')}.index.json", index)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a file as the published ones are written."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def files_beside(source: Path | None) -> list[Path]:
    """The tokenizer's files, and what else every layout needs, of the folder of a checkpoint."""
    if source is None:
        return []
    if not source.is_dir():
        logger.warning("%s: gone, so no tokenizer is saved beside the model", source)
    return sorted(path for pattern in TOKENIZER_FILES for path in source.glob(pattern))


def token_ids(source: Path | None) -> dict[str, Any]:
    """The ids of special tokens that the model's own config.json gives, at its top level."""
    path = source / CONFIG_FILES["huggingface"] if source else None
    if path is None or not path.exists():
        return {}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: value for key, value in read_json(path).items() if key in ids}

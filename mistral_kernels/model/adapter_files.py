"""Files of low-rank adapters, read into updates of a model's matrices.

Two formats: `lora.safetensors` as mistral-finetune writes it, under native names, and PEFT's folder
of `adapter_config.json` and `adapter_model.safetensors`, under Hugging Face's names. Either serves
a model of either rope layout.

Source: mistral-finetune, `finetune/checkpointing.py` and `model/args.py`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from mistral_kernels.model.checkpoint_files import Stored, open_safetensors, read_headers
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.json_fields import JsonFields, read_json
from mistral_kernels.model.layouts import CONFIG_FILES
from mistral_kernels.model.low_rank import Pair, Update, check_pairs
from mistral_kernels.model.peft_files import Copy, peft_pairs
from mistral_kernels.model.peft_settings import CONFIG_FILE
from mistral_kernels.model.weight_table import checkpoint_table

NATIVE_FILE, PEFT_FILE = "lora.safetensors", "adapter_model.safetensors"
NATIVE_SCALING = 2.0  # mistral-finetune's default, where no params.json tells another

# Native adapters exist for these matrices only: never for embeddings, norms, output or the gate.
NATIVE_KEY = re.compile(
    r"(?P<matrix>layers\.\d+\.(attention\.w[qkvo]|feed_forward\.(experts\.\d+\.)?w[123]))"
    r"\.lora_(?P<factor>[AB])\.weight"
)


class Adapter(NamedTuple):
    """An adapter that fits the model; `base` is the name of the one it was made for, if told."""

    file: Path
    updates: list[Update]
    copies: list[Copy]
    base: str | None


def find_adapter(path: str | Path) -> Path:
    """Finds the weights of an adapter.

    Args:
        path: a file, or a folder that holds one adapter.

    Returns:
        The file: PEFT's if it is called `adapter_model.safetensors`, else a native one.

    Raises:
        TypeError: it is no path.
        FileNotFoundError: there is none.
        ValueError: the folder holds adapters of both formats, or there is nothing but a pickle.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"load_lora: path: expected a path, got {type(path).__name__}")
    path = Path(path)
    if path.is_dir():
        present = [name for name in (NATIVE_FILE, PEFT_FILE) if (path / name).exists()]
        pickles = sorted(path.glob("adapter_model*.bin"))
        if len(present) > 1:
            raise ValueError(f"{path}: holds {' and '.join(present)}: name the file to load")
        if not present and not pickles:
            missing = [PEFT_FILE] if (path / CONFIG_FILE).exists() else [NATIVE_FILE, PEFT_FILE]
            raise FileNotFoundError(f"{path}: holds no {' nor '.join(missing)}")
        path = path / present[0] if present else pickles[0]
    if path.suffix in (".bin", ".pt", ".pth"):
        raise ValueError(f"{path}: pickles are not read; PEFT's save_pretrained writes safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def read_adapter(path: str | Path, config: ModelConfig, scaling: float | None = None) -> Adapter:
    """Reads an adapter, all of it checked against the model.

    Args:
        path: a native file, PEFT's file beside its configuration, or a folder that holds one.
        config: the model, of either rope layout.
        scaling: factor of every update; None: as the file beside the adapter says, which a native
            one may lack: then 2.0.

    Returns:
        The adapter; its factors have the dtype of the file and the order of rows of the model.

    Raises:
        TypeError: the path is none.
        FileNotFoundError: there is no such file, or no configuration beside it.
        ValueError: a file is malformed, or holds no adapter, half an adapter, one that does not
            fit the model or is more than a low-rank update; file and key are named.
    """
    file = find_adapter(path)
    native = file.name != PEFT_FILE
    read = _native_pairs if native else peft_pairs
    pairs, copies, base = read(file, config)
    if not pairs:
        raise ValueError(f"{file}: holds no lora_A and lora_B tensors")
    changed = {}
    for pair in pairs:
        pair.check()
        twin = changed.setdefault((pair.place.parameter, str(pair.place.index)), pair)
        if twin is not pair:
            raise ValueError(f"{file}: {pair.a.key}: {twin.a.key} changes the same matrix")
        if scaling is not None:
            pair.scaling = scaling
    with open_safetensors(file) as tensors:
        loaded = [pair.load(tensors, config, interleaved=native) for pair in pairs]
    return Adapter(file, [update for updates in loaded for update in updates], copies, base)


def _native_pairs(file: Path, config: ModelConfig) -> tuple[list[Pair], list[Copy], None]:
    """As `peft_pairs`, but native files hold no whole matrices and do not name their base."""
    table = checkpoint_table(config)
    factors: dict[str, dict[str, Stored]] = {}
    for key, stored in read_headers([file]).items():
        match = NATIVE_KEY.fullmatch(key)
        if not match or f"{match['matrix']}.weight" not in table:
            hint = f"; {PEFT_FILE} is PEFT's name" if key.startswith("base_model.") else ""
            raise ValueError(f"{file}: {key}: not an adapter of a matrix of this model{hint}")
        factors.setdefault(match["matrix"], {})[match["factor"]] = stored
    check_pairs(factors, file)
    scaling, rank = _native_settings(file.parent)
    pairs = [
        Pair(name, pair["A"], pair["B"], table[f"{name}.weight"], scaling, rank)
        for name, pair in factors.items()
    ]
    return pairs, [], None


def _native_settings(folder: Path) -> tuple[float, int | None]:
    """Scaling and rank of a native adapter, which mistral-finetune puts into a `params.json`."""
    path = folder / CONFIG_FILES["native"]
    values = read_json(path) if path.is_file() else {}
    try:
        lora = JsonFields(values).section("lora") or JsonFields({})
        return lora.number("scaling", NATIVE_SCALING), lora.integer("rank", None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

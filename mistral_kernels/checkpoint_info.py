"""What `mistral-kernels info FOLDER` tells of a checkpoint, without reading a weight.

Configuration, tokenizer and the headers of the weight files are read; sizes follow from shapes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mistral_kernels.free_memory import free_memory
from mistral_kernels.model.backends import choose_backends, op_backends
from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.families import family_of, is_chat_name
from mistral_kernels.model.hub import model_name, resolve_folder
from mistral_kernels.model.layouts import LAYOUTS, Layout, folder_layout
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.prompt_chunks import step_tokens, token_bytes
from mistral_kernels.model.step_graphs import graph_bytes, waiting_ops
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.model.weight_table import parameter_shapes
from mistral_kernels.model.weights import DTYPES, Checkpoint, read_headers
from mistral_kernels.ops.prefill_attention import QUERY_BLOCK

CONTEXT = 32768  # tokens of the sequence for which it is told whether the model fits
PARTS = {
    "tok_embeddings": "embedding",
    "wqkv": "attention",
    "wo": "attention",
    "gate": "router",
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "norm": "norms",
    "output": "output",
}

# What is known only of a model whose configuration can be read.
OF_A_MODEL = (
    *("family", "max_positions", "dtype", "quantisation", "parameters", "parts", "bytes"),
    *("windows", "cache", "ops", "context", "memory"),
)


def collect_checkpoint(folder: str | Path, layout: Layout | None = None) -> dict[str, Any]:
    """Return the facts about a checkpoint and what it needs of this machine.

    Args:
        folder: the checkpoint, or a model of the Hugging Face hub: then its configuration and
            tokenizer are downloaded where the cache lacks them, its weights are not.
        layout: "native" or "huggingface"; None finds out.

    Returns:
        A dictionary that json can write. What cannot be known is None:
        name, folder, layout: of the checkpoint;
        problem: why it cannot be loaded, None if it can;
        files: weight file -> bytes; stored: dtype in their headers -> number of values;
        family: a published model of this shape; max_positions: it was made for so many;
        chat_model: whether a chat template lies there, or the name says so;
        tokenizer: file, kind, version, vocab, chat_template, and problem or None;
        dtype: in which it is loaded; quantisation: how weights are stored in few bits, None if all
            are in full; parameters: total, active (those that one token meets);
        parts: part of the model -> parameters and bytes when loaded, the bytes sum to `bytes`;
        windows: [window or None, number of layers] pairs;
        cache: bytes_per_token while no window is full, and tokens -> bytes of one sequence;
        ops: device -> op -> backend;
        memory: device -> prompt, the tokens of a prompt fed at once, and of one sequence of
            `context` tokens the bytes free, weights, cache, working, graphs (of decode steps),
            needed, and short, those that are missing, 0 if it fits.

    Raises:
        OSError: there is no such folder, or it holds no configuration.
        ValueError: the layout does not exist.
    """
    asked = Path(folder)
    folder = resolve_folder(folder, layout=layout, weights=False)
    layout = folder_layout(folder, layout)
    files = _weight_files(folder, layout)
    facts: dict[str, Any] = {
        "name": model_name(folder),
        "folder": str(folder),
        "layout": str(layout),
        "files": {path.name: path.stat().st_size for path in files},
        "stored": _stored_values(files),
    }
    config, dtype, problem = None, _dtype_to_be(facts["stored"]), None
    quantisation, low_bit = None, {}
    try:
        config = ModelConfig.from_folder(folder, layout)
        checkpoint = Checkpoint(folder, config, layout)
        config, dtype, low_bit = checkpoint.config, checkpoint.dtype, checkpoint.forms
        quantisation = checkpoint.quantisation and str(checkpoint.quantisation)
    except FileNotFoundError as error:
        of_hub = folder != asked and not files
        problem = f"{'before its weights are downloaded, as loading does: ' * of_hub}{error}"
    except (ValueError, OSError) as error:
        problem = str(error)
    tokenizer = _tokenizer_facts(folder, config)
    chat_model = tokenizer["chat_template"] or is_chat_name(facts["name"])
    facts |= {"problem": problem, "tokenizer": tokenizer, "chat_model": chat_model}
    if config is None:
        return facts | dict.fromkeys(OF_A_MODEL)
    return facts | {"quantisation": quantisation} | _model_facts(config, dtype, low_bit)


def _weight_files(folder: Path, layout: Layout) -> list[Path]:
    """The weight files that are read in a layout: safetensors, or pickles if there are none."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    files = LAYOUTS[layout]
    found = [name for name in files.among(names) if name != files.index]
    return [folder / name for name in found or files.pickles_among(names)]


def _stored_values(files: list[Path]) -> dict[str, int] | None:
    """dtype -> number of values by the headers of safetensors files; None if one is damaged."""
    try:
        headers = read_headers([path for path in files if path.suffix == ".safetensors"])
    except (ValueError, OSError):
        return None
    values: Counter[str] = Counter()
    for tensor in headers.values():
        values[tensor.dtype] += math.prod(tensor.shape)
    return dict(values)


def _dtype_to_be(stored: dict[str, int] | None) -> torch.dtype:
    """The dtype that weights would most likely be loaded in."""
    floats = {name: count for name, count in (stored or {}).items() if name in DTYPES}
    return DTYPES[max(floats, key=floats.__getitem__)] if floats else torch.bfloat16


def _tokenizer_facts(folder: Path, config: ModelConfig | None) -> dict[str, Any]:
    facts = dict.fromkeys(("file", "kind", "version", "vocab", "chat_template", "problem"))
    try:
        tokenizer = Tokenizer.from_folder(folder)
        facts |= {
            "file": tokenizer.path.name,
            "kind": tokenizer.kind,
            "version": tokenizer.version,
            "vocab": tokenizer.vocab,
            "chat_template": tokenizer.has_chat_template,
        }
        if config is not None:
            tokenizer.check_fits(config)
    except (ValueError, OSError) as error:
        facts["problem"] = str(error)
    return facts


def _model_facts(
    config: ModelConfig, dtype: torch.dtype, low_bit: Mapping[str, LowBitForm]
) -> dict[str, Any]:
    """What follows from the shape of a model, its dtype, what is in few bits, and this machine."""
    parts = part_sizes(config, dtype, low_bit)
    context = min(CONTEXT, config.max_positions or CONTEXT)
    windows = Counter(config.windows)
    tokens = {context, *filter(None, (config.max_positions, *windows))}
    free = free_memory()
    ops = {
        device: choose_backends(config, device=torch.device(device), dtype=dtype, low_bit=low_bit)
        for device in free
    }
    needed = {
        "weights": sum(part["bytes"] for part in parts.values()),
        "cache": cache_bytes(config, context, dtype),
    }
    memory = {}
    for device in free:
        place = torch.device(device)
        prompt = min(step_tokens(config, dtype, place.type), context)
        serving = op_backends(config, device=place, dtype=dtype, low_bit=low_bit)
        replayed = place.type == "cuda" and not waiting_ops(serving)
        working = working_bytes(config, dtype, ops[device], tokens=prompt, context=context)
        graphs = graph_bytes(config, dtype, 1) if replayed else 0
        fit = _fit(free[device], needed | {"working": working, "graphs": graphs})
        memory[device] = {"prompt": prompt, **fit}
    return {
        "family": family_of(config),
        "max_positions": config.max_positions,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": {
            "total": config.num_parameters(),
            "active": config.num_parameters(active=True),
        },
        "parts": parts,
        "bytes": needed["weights"],
        "windows": [[window, layers] for window, layers in windows.items()],
        "cache": {
            "bytes_per_token": cache_bytes(config, 16, dtype) // 16,
            "bytes": {count: cache_bytes(config, count, dtype) for count in sorted(tokens)},
        },
        "ops": ops,
        "context": context,
        "memory": memory,
    }


def part_sizes(
    config: ModelConfig, dtype: torch.dtype, low_bit: Mapping[str, LowBitForm]
) -> dict[str, dict[str, int]]:
    """Part of the model -> its parameters, and their bytes when loaded."""
    parts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, shape in parameter_shapes(config).items():
        feed_forward = "experts" if config.experts else "feed-forward"
        part = parts[PARTS.get(name.rpartition(".")[2], feed_forward)]
        count = math.prod(shape)
        part["parameters"] += count
        form = low_bit.get(name)
        part["bytes"] += form.nbytes(shape) if form else count * dtype.itemsize
    return {name: dict(part) for name, part in parts.items()}


def cache_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the rolling cache of one sequence of so many tokens."""
    return KVCache(config, 1, tokens, device=torch.device("meta"), dtype=dtype).nbytes


def working_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    backends: dict[str, str],
    *,
    tokens: int,
    context: int,
    batch: int = 1,
) -> int:
    """About the bytes that a step takes besides weights and cache, while it reads prompts.

    With the rotary tables, which come to count where a context is absurdly long.

    Args:
        config, dtype: of the model.
        backends: op -> the backend that serves it.
        tokens: fed in the step, of all sequences.
        context: tokens of a sequence after it.
        batch: sequences, each of which gets logits.
    """
    # A sine and a cosine for each pair, made of three tables in float64.
    pairs = context * config.head_dim // 2
    found = pairs * (2 * torch.float32.itemsize + 3 * torch.float64.itemsize)
    found += tokens * token_bytes(config, dtype)
    if backends["prefill_attention"] == "reference":
        # Scores of a block of queries: as they come, shifted, and their exponentials.
        keys = min(context, max(w or context for w in config.windows) + QUERY_BLOCK)
        found += 3 * QUERY_BLOCK * keys * config.q_heads * torch.float32.itemsize
    return found + batch * config.vocab * torch.float32.itemsize


def _fit(free: int | None, needed: dict[str, int]) -> dict[str, int | None]:
    total = sum(needed.values())
    short = None if free is None else max(total - free, 0)
    return {"free": free, **needed, "needed": total, "short": short}

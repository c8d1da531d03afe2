"""The published models whose shape is known by name: `ModelConfig.known("mistral-7b-v0.3")`.

One row is one shape, with the names of all repositories that have it; of a multimodal model it is
the text part. Every number was compared with a published `params.json` or `config.json`, a copy of
one kept by a fine-tune, or a configuration class of transformers 5.23, except where a comment says
otherwise. All have head_dim 128, 8 key and value heads and a norm epsilon of 1e-5; hidden is often
not q_heads * head_dim.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mistral_kernels.model.config_formats import MAMBA, MLA

if TYPE_CHECKING:
    from mistral_kernels.model.config import ModelConfig


def _yarn(
    factor: float,
    original: int,
    *,
    query_beta: float = 0.0,
    beta_fast: float = 32.0,
    attention_factor: float = 1.0,
) -> dict[str, Any]:
    """YaRN and the query scale, which count the same original positions; a beta of 0 is none."""
    return {
        "yarn": {
            "factor": factor,
            "original_max_positions": original,
            "beta_fast": beta_fast,
            "beta_slow": 1.0,
            "attention_factor": attention_factor,
            "truncate": True,
        },
        "q_scale": {"beta": query_beta, "original_max_positions": original} if query_beta else None,
    }


def _shape(
    hidden: int,
    layers: int,
    q_heads: int,
    ffn_dim: int,
    vocab: int,
    rope_theta: float,
    max_positions: int,
    *,
    windows: tuple[int | None, ...] = (None,),
    experts: int = 0,
    tied: bool = False,
    long: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of a ModelConfig; `windows` repeats over the layers, `long` comes from `_yarn`."""
    return {
        "hidden": hidden,
        "layers": layers,
        "q_heads": q_heads,
        "kv_heads": 8,
        "head_dim": 128,
        "ffn_dim": ffn_dim,
        "vocab": vocab,
        "norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "windows": windows * (layers // len(windows)),
        "tied_embeddings": tied,
        "experts": experts,
        "top_k": 2 if experts else 0,
        **(long or {"yarn": None, "q_scale": None}),
        "interleaved": True,
        "max_positions": max_positions,
    }


MINISTRAL3 = _yarn(16.0, 16384, query_beta=0.1)
DEVSTRAL_SMALL2 = _yarn(48.0, 8192, query_beta=0.1)
# The one that scales cos and sin, as YaRN's paper has it.
DEVSTRAL2 = _yarn(64.0, 4096, beta_fast=4.0, attention_factor=0.1 * math.log(64) + 1)

# Names, then hidden, layers, q_heads, ffn_dim, vocab, rope_theta, max_positions.
SHAPES: list[tuple[str, dict[str, Any]]] = [
    (
        "mistral-7b-v0.1 mistral-7b-instruct-v0.1",
        _shape(4096, 32, 32, 14336, 32000, 1e4, 32768, windows=(4096,)),
    ),
    (
        "mistral-7b-v0.2 mistral-7b-instruct-v0.2",
        _shape(4096, 32, 32, 14336, 32000, 1e6, 32768),
    ),
    (
        # litgpt gives Mathstral a window of 4096; two copies of its config.json give none.
        "mistral-7b-v0.3 mistral-7b-instruct-v0.3 mathstral-7b-v0.1",
        _shape(4096, 32, 32, 14336, 32768, 1e6, 32768),
    ),
    (
        "mixtral-8x7b-v0.1 mixtral-8x7b-instruct-v0.1",
        _shape(4096, 32, 32, 14336, 32000, 1e6, 32768, experts=8),
    ),
    (
        "mixtral-8x22b-v0.1",
        _shape(6144, 56, 48, 16384, 32000, 1e6, 65536, experts=8),
    ),
    (
        "mixtral-8x22b-v0.3 mixtral-8x22b-instruct-v0.3 mixtral-8x22b-instruct-v0.1",
        _shape(6144, 56, 48, 16384, 32768, 1e6, 65536, experts=8),
    ),
    (
        # Some copies of Small's config.json say 131072 positions.
        "mistral-small-instruct-2409 codestral-22b-v0.1",
        _shape(6144, 56, 48, 16384, 32768, 1e6, 32768),
    ),
    (
        # Copies of the first config.json say 1024000 positions; the announcement, 128k.
        "mistral-nemo-base-2407 mistral-nemo-instruct-2407",
        _shape(5120, 40, 32, 14336, 131072, 1e6, 131072),
    ),
    (
        # Nemo with another theta; copies of its config.json say 1024000 positions, params.json
        # nothing: that it was made for 131072 is unverified.
        "pixtral-12b-2409 pixtral-12b-base-2409",
        _shape(5120, 40, 32, 14336, 131072, 1e9, 131072),
    ),
    (
        "mistral-small-24b-base-2501 mistral-small-24b-instruct-2501",
        _shape(5120, 40, 32, 32768, 131072, 1e8, 32768),
    ),
    (
        # 3.2, Magistral and Devstral were trained from 3.1; that their own files say the same is
        # unverified (Magistral's card advises against more than 40960 positions).
        "mistral-small-3.1-24b-base-2503 mistral-small-3.1-24b-instruct-2503"
        " mistral-small-3.2-24b-instruct-2506 magistral-small-2506 magistral-small-2507"
        " magistral-small-2509 devstral-small-2505 devstral-small-2507",
        _shape(5120, 40, 32, 32768, 131072, 1e9, 131072),
    ),
    (
        # The first config.json of 2407 said 32768 positions.
        "mistral-large-instruct-2411 mistral-large-instruct-2407",
        _shape(12288, 88, 96, 28672, 32768, 1e6, 131072),
    ),
    (
        # The windows stand in params.json alone, of which no copy was found; transformers'
        # documentation describes them: one full layer, then three sliding ones.
        "ministral-8b-instruct-2410",
        _shape(4096, 36, 32, 12288, 131072, 1e8, 131072, windows=(None, 32768, 32768, 32768)),
    ),
    (
        "ministral-3-3b-base-2512 ministral-3-3b-instruct-2512 ministral-3-3b-reasoning-2512",
        _shape(3072, 26, 32, 9216, 131072, 1e6, 262144, tied=True, long=MINISTRAL3),
    ),
    (
        "ministral-3-8b-base-2512 ministral-3-8b-instruct-2512 ministral-3-8b-reasoning-2512",
        _shape(4096, 34, 32, 14336, 131072, 1e6, 262144, long=MINISTRAL3),
    ),
    (
        # theta as two third parties quote it from config.json, of which no copy was found;
        # that its query scale is its siblings' is unverified.
        "ministral-3-14b-base-2512 ministral-3-14b-instruct-2512 ministral-3-14b-reasoning-2512",
        _shape(5120, 40, 32, 16384, 131072, 1e9, 262144, long=MINISTRAL3),
    ),
    (
        "devstral-small-2-24b-instruct-2512",
        _shape(5120, 40, 32, 32768, 131072, 1e8, 393216, long=DEVSTRAL_SMALL2),
    ),
    (
        # Its rope stands in a miniature made from it, the sizes are Mistral Large's: unverified.
        "devstral-2-123b-instruct-2512",
        _shape(12288, 88, 96, 28672, 131072, 1e6, 262144, long=DEVSTRAL2),
    ),
]

NAMES: dict[str, dict[str, Any]] = {name: s for names, s in SHAPES for name in names.split()}

# Published models of other architectures, by how their names begin.
UNSUPPORTED = {
    "mamba-codestral": MAMBA,
    "codestral-mamba": MAMBA,
    "mistral-large-3": MLA,
    "mistral-small-4": MLA,
}

# Words that mark a model tuned for chat; a model without one is taken for a base model.
CHAT_WORDS = {"instruct", "chat", "reasoning", "magistral", "devstral", "codestral", "mathstral"}


def known_fields(name: str) -> dict[str, Any]:
    """The shape of a published model.

    Args:
        name: its repository's name on the hub, in any case, with or without the organisation.

    Returns:
        The keyword arguments of ModelConfig; `yarn` and `q_scale` are theirs, or None.

    Raises:
        TypeError: the name is no string.
        ValueError: no supported model has this name; the closest names are listed.
    """
    if not isinstance(name, str):
        raise TypeError(f"known: name must be a str, got {type(name).__name__}")
    key = name.rpartition("/")[2].lower()
    if key in NAMES:
        return dict(NAMES[key])
    for beginning, reason in UNSUPPORTED.items():
        if key.startswith(beginning):
            raise ValueError(f"known: {name}: {reason}")
    close = get_close_matches(key, NAMES, n=5) or [names.split()[0] for names, _ in SHAPES]
    raise ValueError(
        f"known: name must be a published model, such as {', '.join(close)}; got {name!r}"
    )


def family_of(config: ModelConfig) -> str | None:
    """The published model that has a configuration's shape, of several the first in the table.

    Args:
        config: a model; the layout it was read from and its max_positions do not matter.

    Returns:
        A name that `ModelConfig.known` takes, or None.
    """
    wanted = asdict(config) | {"interleaved": True}
    for names, shape in SHAPES:
        if shape == wanted | {"max_positions": shape["max_positions"]}:
            return names.split()[0]
    return None


def is_chat_name(name: str) -> bool:
    """Whether a model's name says that it was tuned for chat.

    Args:
        name: a repository, folder or file name, published or not.

    Returns:
        False also for a name that does not tell.
    """
    words = set(re.split(r"[^a-z]+", name.lower()))
    # Pixtral 12B has no such word: the plain name is the tuned model.
    return bool(words & CHAT_WORDS or "pixtral" in words) and "base" not in words

"""The shape of a model, read from a Mistral-native or a Hugging Face folder.

Native folders describe the model in `params.json`, Hugging Face folders in `config.json`. Both end
in one ModelConfig; the model itself never asks which file it came from, only in which order the
rows of wq and wk are stored (`interleaved`).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_kernels.model.config_formats import huggingface_fields, native_fields
from mistral_kernels.model.families import known_fields
from mistral_kernels.model.hub import resolve_folder
from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.layouts import CONFIG_FILES, Layout, folder_layout


@dataclass(frozen=True)
class Yarn:
    """YaRN rope scaling: low frequencies are divided by `factor`, high ones kept, a ramp between.

    `beta_fast` and `beta_slow` are the rotations over `original_max_positions` at which the ramp
    ends and starts; `truncate` rounds its bounds outwards to whole dimensions; cos and sin are
    multiplied by `attention_factor`. Source: https://arxiv.org/abs/2309.00071
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_integers(self, "original_max_positions")
        _check_numbers(self, "factor", "beta_fast", "beta_slow", "attention_factor")


@dataclass(frozen=True)
class QueryScale:
    """Llama 4's query scale `1 + beta * log(1 + floor(position / original_max_positions))`."""

    beta: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _check_integers(self, "original_max_positions")
        _check_numbers(self, "beta")


@dataclass(frozen=True)
class ModelConfig:
    """Every number that shapes a model.

    Args:
        hidden: width of the residual stream.
        layers: number of blocks.
        q_heads, kv_heads: heads of queries, and of keys and values; q_heads = group * kv_heads.
        head_dim: size of a head; q_heads * head_dim may differ from hidden.
        ffn_dim: inner width of the feed-forward network, of each expert where there are experts.
        vocab: number of token ids.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        windows: keys a query may see, itself included, one entry a layer; None = all.
        tied_embeddings: the output matrix is the embedding matrix.
        experts: experts a layer; 0 = a dense model.
        top_k: experts a token is sent to; 0 in a dense model.
        yarn: YaRN scaling of the rotary frequencies, or None.
        q_scale: position-dependent scale of the queries, or None.
        max_positions: positions the model was made for, None if the file does not tell. Nothing
            enforces it, and configurations that differ in it alone are equal.
        interleaved: rope turns pairs (0, 1), (2, 3).. of a head (native) rather than
            (0, head_dim/2), (1, head_dim/2 + 1).. (Hugging Face).

    Raises:
        ValueError: a field is out of range or contradicts another.
    """

    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    windows: tuple[int | None, ...]
    tied_embeddings: bool = False
    experts: int = 0
    top_k: int = 0
    yarn: Yarn | None = None
    q_scale: QueryScale | None = None
    interleaved: bool = True
    max_positions: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_integers(
            self, "hidden", "layers", "q_heads", "kv_heads", "head_dim", "ffn_dim", "vocab"
        )
        _check_numbers(self, "norm_eps", "rope_theta")
        if self.max_positions is not None:
            _check_integers(self, "max_positions")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"ModelConfig: q_heads {self.q_heads} is not a multiple of kv_heads {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim: expected an even number, got {self.head_dim}")
        if self.yarn is not None and self.rope_theta <= 1:
            raise ValueError(
                f"ModelConfig: rope_theta: expected > 1 with yarn, got {self.rope_theta}"
            )
        if len(self.windows) != self.layers:
            raise ValueError(
                f"ModelConfig: windows: expected {self.layers} entries, got {len(self.windows)}"
            )
        for window in self.windows:
            if window is not None and not _is_positive_integer(window):
                raise ValueError(f"ModelConfig: windows: expected None or >= 1, got {window!r}")
        if self.experts < 0 or not min(1, self.experts) <= self.top_k <= self.experts:
            raise ValueError(
                "ModelConfig: top_k: expected 1 <= top_k <= experts, or both 0, "
                f"got top_k {self.top_k} and experts {self.experts}"
            )

    @classmethod
    def known(cls, name: str) -> "ModelConfig":
        """The configuration of a published model, in the native layout (`interleaved`).

        Args:
            name: its name on the hub, as "mistral-7b-v0.3" or "mistralai/Mistral-7B-v0.3".

        Returns:
            The configuration; of a multimodal model, of its text part.

        Raises:
            TypeError: the name is no string.
            ValueError: no supported model has this name; the closest names are listed.
        """
        return cls._from_fields(known_fields(name))

    @classmethod
    def from_native(cls, params: dict[str, Any]) -> "ModelConfig":
        """Reads the contents of a `params.json`; ValueErrors name the key."""
        return cls._from_fields(native_fields(params))

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> "ModelConfig":
        """Reads the contents of a `config.json`, its text part in a multimodal one."""
        return cls._from_fields(huggingface_fields(config))

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "ModelConfig":
        yarn, q_scale = fields.pop("yarn"), fields.pop("q_scale")
        return cls(
            **fields,
            yarn=Yarn(**yarn) if yarn else None,
            q_scale=QueryScale(**q_scale) if q_scale else None,
        )

    def num_parameters(self, *, active: bool = False) -> int:
        """Counts the parameters, from the shapes alone.

        Args:
            active: only those that one token meets: of each layer's experts `top_k`.

        Returns:
            Their number; an embedding that is also the output counts once.
        """
        attention = 2 * (self.q_heads + self.kv_heads) * self.head_dim * self.hidden
        feed_forward = 3 * self.hidden * self.ffn_dim
        if self.experts:
            gate = self.experts * self.hidden
            feed_forward = gate + (self.top_k if active else self.experts) * feed_forward
        ends = self.vocab * self.hidden * (1 if self.tied_embeddings else 2) + self.hidden
        return self.layers * (attention + feed_forward + 2 * self.hidden) + ends

    @classmethod
    def from_folder(cls, folder: str | Path, layout: Layout | None = None) -> "ModelConfig":
        """Reads a checkpoint folder's configuration.

        Args:
            folder: path of the checkpoint, or a model of the Hugging Face hub as `resolve_folder`
                takes it; its weights are not downloaded.
            layout: "native" or "huggingface"; None finds out, see `folder_layout`.

        Returns:
            The configuration.

        Raises:
            OSError: there is no such folder or file, or it cannot be downloaded.
            ValueError: the file is malformed or describes a model that is not supported; file and
                key are named.
        """
        folder = resolve_folder(folder, layout=layout, weights=False)
        layout = folder_layout(folder, layout)
        path = folder / CONFIG_FILES[layout]
        values = read_json(path)
        try:
            return cls.from_native(values) if layout == "native" else cls.from_huggingface(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _is_positive_integer(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _check_integers(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not _is_positive_integer(value):
            raise ValueError(f"{type(owner).__name__}: {name}: expected >= 1, got {value!r}")


def _check_numbers(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"{type(owner).__name__}: {name}: expected a finite number > 0, got {value!r}"
            )

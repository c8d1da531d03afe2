"""What a PEFT `adapter_config.json` says of its adapter: rank and scaling of every matrix.

Source: peft 0.21.2, `LoraConfig` and `get_pattern_key`.
"""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_kernels.model.json_fields import JsonFields, read_json

logger = logging.getLogger("mistral_kernels")

CONFIG_FILE = "adapter_config.json"

# Variants that change a model by more than W += scaling * B @ A.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA serves some tokens only and cannot be merged",
    "arrow_config": "Arrow chooses adapters token by token and cannot be merged",
    "kasa_config": "KaSA is not supported",
    "layer_replication": "replicated layers are not supported",
    "lora_bias": "the model has no biases that could take those of an adapter",
    "modules_to_save": "whole matrices cannot be merged, merge and save the model with PEFT",
    "monteclora_config": "MonteCLoRA is not supported",
    "trainable_token_indices": "single token embeddings cannot be merged",
    "use_bdlora": "BD-LoRA is not supported",
    "use_dora": "DoRA is not supported",
    "use_qalora": "QA-LoRA is not supported",
    "velora_config": "VeLoRA is not supported",
}

# Ways to start a training that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
# subtract the first B @ A from it: such an adapter on the untouched base would be silently wrong.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Keys that are read, and keys that change nothing of what a trained adapter does. `bias` trains
# biases of the base, of which the model has none; PEFT itself ignores `fan_in_fan_out` for
# nn.Linear. What the targets are is told by the keys of the tensors.
KNOWN = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_parameters", "init_lora_weights", "base_model_name_or_path"),
    *("auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type"),
}


@dataclass(frozen=True)
class PeftSettings:
    """The settings of an adapter that decide what it adds.

    Attributes:
        rank, alpha: of every matrix that no pattern matches.
        rslora: scaling is alpha / sqrt(rank), not alpha / rank.
        rank_patterns, alpha_patterns: for the matrices whose names match, the first match counts.
        target_parameters: endings of the names of parameters that were adapted by that name.
        base: name or folder of the model that it was made for, None if it does not tell.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_patterns: dict[re.Pattern[str], int]
    alpha_patterns: dict[re.Pattern[str], float]
    target_parameters: tuple[str, ...]
    base: str | None

    @classmethod
    def from_folder(cls, folder: Path) -> "PeftSettings":
        """Reads a folder's `adapter_config.json`.

        Args:
            folder: of the adapter.

        Returns:
            Its settings.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is malformed or asks for more than a plain low-rank update; file and
                key are named.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; it tells the scaling of a PEFT adapter")
        values = read_json(path)
        try:
            settings = cls._from_fields(JsonFields(values))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        unknown = sorted(key for key in values.keys() - KNOWN - REFUSED.keys() if values[key])
        if unknown:
            logger.warning("%s: unknown keys are ignored: %s", path, ", ".join(unknown))
        return settings

    @classmethod
    def _from_fields(cls, fields: JsonFields) -> "PeftSettings":
        fields.choice("peft_type", ("LORA",))
        for key, reason in REFUSED.items():
            fields.refuse(key, reason)
        start = fields.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            plain = ", ".join(map(str, PLAIN_STARTS))
            raise ValueError(
                f"init_lora_weights: expected one of {plain}, got {start!r:.80}: such an adapter"
                " may change its base as well, let PEFT convert it to a plain one"
            )
        targets = fields.get("target_parameters", [])
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise fields.error("target_parameters", "a list of names")
        base = fields.get("base_model_name_or_path", None)
        if not isinstance(base, str | None):
            raise fields.error("base_model_name_or_path", "a name")
        return cls(
            rank=fields.integer("r"),
            alpha=fields.number("lora_alpha"),
            rslora=fields.flag("use_rslora", False),
            rank_patterns=_patterns(fields.section("rank_pattern"), JsonFields.integer),
            alpha_patterns=_patterns(fields.section("alpha_pattern"), JsonFields.number),
            target_parameters=tuple(targets),
            base=base,
        )

    def of_matrix(self, name: str) -> tuple[int, float]:
        """Rank and scaling of one matrix.

        Args:
            name: of the layer that holds it, as "model.layers.0.self_attn.q_proj", or of the
                parameter where that is the matrix, as "model.layers.0.mlp.experts.down_proj".

        Returns:
            The rank, and the factor of B @ A.
        """
        if any(f".{name}.weight".endswith(f".{target}") for target in self.target_parameters):
            name = f"{name}.weight"
        rank = _first_match(self.rank_patterns, name, self.rank)
        alpha = _first_match(self.alpha_patterns, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _patterns(section: JsonFields | None, read: Callable[..., Any]) -> dict[re.Pattern[str], Any]:
    """Compiles the keys of an object of patterns and reads its values."""
    compiled = {}
    for pattern in section.values if section else ():
        try:
            compiled[re.compile(rf"(.*\.)?({pattern})")] = read(section, pattern)
        except re.error as error:
            raise ValueError(f"{section.name(pattern)}: no regular expression: {error}") from error
    return compiled


def _first_match(patterns: dict[re.Pattern[str], Any], name: str, default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if pattern.fullmatch(name)), default)

"""What the arguments of generation must be, and prompts, seeds and stops as the loop takes them."""

from __future__ import annotations

import operator
import secrets
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.forward_checks import check_cache
from mistral_kernels.model.sampling import Sampling
from mistral_kernels.model.stop_text import stop_strings
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.ops.checks import check_int, is_int, is_number

if TYPE_CHECKING:
    from mistral_kernels.model.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Settings:
    """The arguments of `generate` that hold for all prompts, under their names."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    chunk_size: int | None
    eos_id: int | None
    prompt_logprobs: bool
    stop: str | Sequence[str] | None
    cancel: threading.Event | None

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def check(self, model: Transformer) -> None:
        """Checks the model and every one of them; TypeError or ValueError names it."""
        # Not its class: torch.compile wraps it in another module.
        if not isinstance(getattr(model, "config", None), ModelConfig):
            raise TypeError(f"generate: model must be a Transformer, got {type(model).__name__}")
        vocab = model.config.vocab
        for name, minimum in (("max_tokens", 0), ("top_k", 1), ("chunk_size", 1), ("eos_id", 0)):
            value = getattr(self, name)
            if value is None and name != "max_tokens":
                continue
            check_int("generate", name, value, minimum)
        if self.eos_id is not None and self.eos_id >= vocab:
            raise ValueError(f"generate: eos_id must be in [0, {vocab}), got {self.eos_id}")
        if not isinstance(self.prompt_logprobs, bool):
            name = type(self.prompt_logprobs).__name__
            raise TypeError(f"generate: prompt_logprobs must be a bool, got {name}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"generate: {name} must be a float, got {type(value).__name__}")
        if not 0 <= self.temperature <= sys.float_info.max:  # an int may be larger
            raise ValueError(
                f"generate: temperature must be finite and >= 0, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1], got {self.top_p}")
        stop_strings(self.stop, "generate: stop")
        # Whatever answers is_set: multiprocessing has events too.
        if self.cancel is not None and not callable(getattr(self.cancel, "is_set", None)):
            name = type(self.cancel).__name__
            raise TypeError(f"generate: cancel must be a threading.Event, got {name}")


def tokenizer_for(model: Transformer, argument: str) -> Tokenizer:
    """The model's tokenizer; where it has none, the error says that `argument` needs it."""
    try:
        return model.tokenizer
    except ValueError as error:
        raise ValueError(f"generate: {argument} needs the model's tokenizer: {error}") from error


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Checks for a list of prompts, before any is looked at."""
    expected, name = "generate: encoded_prompts must be a list of prompts", type(prompts).__name__
    if isinstance(prompts, (str, bytes)):
        raise TypeError(f"{expected}, got one {name}: put it into a list")
    if not isinstance(prompts, Sequence):
        raise TypeError(f"{expected}, got {name}")


def token_ids(prompt: Prompt, model: Transformer, name: str, *, bos: bool) -> list[int]:
    """The ids of one prompt, which an error calls `name`; text is encoded, after BOS if `bos`."""
    if isinstance(prompt, str):
        tokenizer = tokenizer_for(model, name)
        try:
            ids = tokenizer.encode(prompt, bos=bos)
        except ValueError as error:
            raise ValueError(f"generate: {name}: {error}") from error
    else:
        ids = _given_ids(prompt, name)
    if not ids:
        raise ValueError(f"generate: {name} must hold at least one token, got none")
    vocab = model.config.vocab
    for token in ids:
        if not 0 <= token < vocab:
            raise ValueError(f"generate: {name} must hold ids in [0, {vocab}), got {token}")
    return ids


def _given_ids(prompt: object, name: str) -> list[int]:
    """The ids of a list, a numpy array or a tensor."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # one copy from a GPU
    # A set has no order, and of a dict only the keys would be read.
    if isinstance(values, (bytes, bytearray)) or not isinstance(values, Sequence):
        got = type(prompt).__name__
        raise TypeError(f"generate: {name} must be a string or a list of token ids, got {got}")
    if any(isinstance(token, bool) for token in values):
        raise TypeError(f"generate: {name} must hold ints, got bools: {prompt!r:.80}")
    try:
        return [operator.index(token) for token in values]  # numpy's integers too
    except TypeError as error:
        raise TypeError(f"generate: {name} must hold ints, got {prompt!r:.80}") from error


def seeds_of(seed: int | Sequence[int] | None, prompts: int) -> list[int]:
    """One seed a prompt, from the argument `seed`."""
    if seed is None:
        seed = secrets.randbits(63)
    seeds = [seed + i for i in range(prompts)] if is_int(seed) else seed
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not all(map(is_int, seeds)):
        raise TypeError(f"generate: seed must be an int, a list of ints or None, got {seed!r}")
    if len(seeds) != prompts:
        raise ValueError(f"generate: seed must have {prompts} entries, got {len(seeds)}")
    return [value % 2**64 for value in seeds]


def check_places(cache: KVCache, model: Transformer, prompts: int) -> None:
    """Checks that a given cache is the model's, with a place for each prompt."""
    check_cache(cache, model, "generate")
    if cache.batch != prompts:
        raise ValueError(
            f"generate: cache must have one place for each of {prompts} prompts, got {cache.batch}"
        )

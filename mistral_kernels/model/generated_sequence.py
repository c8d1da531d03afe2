"""The sequences of a generation: prompts, and what has become of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.generate_checks import (
    Prompt,
    Settings,
    check_places,
    check_prompts,
    seeds_of,
    token_ids,
    tokenizer_for,
)
from mistral_kernels.model.sampling import uniform_draws
from mistral_kernels.model.stop_text import StopText
from mistral_kernels.model.transformer import Transformer

if TYPE_CHECKING:
    from mistral_kernels.model.tokenizer import TextStream

DRAWS_AT_ONCE = 32


@dataclass
class GeneratedSequence:
    """A sequence in its place: what it must still be fed, how far it has drawn, where it ends."""

    index: int
    pending: list[int]
    seed: int
    eos_id: int | None
    text: TextStream | None  # of the new tokens; None without stop strings
    stop: StopText
    drawn: int = 0
    draws: list[float] = field(default_factory=list)  # of this and the next tokens

    def draw(self, temperature: float) -> float:
        """The number in [0, 1) that the next token is sampled with; greedily none is drawn."""
        if not temperature:
            return 0.0
        place = self.drawn % DRAWS_AT_ONCE
        if place == 0:
            self.draws = uniform_draws(self.seed, self.drawn, DRAWS_AT_ONCE)
        return self.draws[place]

    def stops_at(self, token: int) -> bool:
        """Takes a new token; tells whether the text of all of them now holds a stop string."""
        if self.text is not None:
            self.stop.push(self.text.push(token))
        return self.stop.stopped


def checked_sequences(
    encoded_prompts: Sequence[Prompt],
    model: Transformer,
    settings: Settings,
    seed: int | Sequence[int] | None,
    cache: KVCache | None,
) -> list[GeneratedSequence]:
    """The prompts, ready to run. All arguments are checked here, before anything is fed."""
    settings.check(model)
    check_prompts(encoded_prompts)
    if cache is not None:
        check_places(cache, model, len(encoded_prompts))
    seeds = seeds_of(seed, len(encoded_prompts))
    sequences = []
    for index, prompt in enumerate(encoded_prompts):
        fresh = cache is None or cache.lengths[index] == 0
        ids = token_ids(prompt, model, f"encoded_prompts[{index}]", bos=fresh)
        eos_id = settings.eos_id
        if eos_id is None and isinstance(prompt, str):
            eos_id = model.tokenizer.eos_id
        text = _new_text(model) if settings.stop else None
        sequences.append(
            GeneratedSequence(index, ids, seeds[index], eos_id, text, StopText(settings.stop))
        )
    if cache is not None:
        # The last token drawn is not fed.
        fed = [len(s.pending) + max(settings.max_tokens - 1, 0) for s in sequences]
        cache.check_room(fed, "generate: cache")
    return sequences


def _new_text(model: Transformer) -> TextStream:
    """The text of new tokens, which follow a prompt."""
    tokenizer = tokenizer_for(model, "stop")
    from mistral_kernels.model.tokenizer import TextStream  # loads mistral-common

    return TextStream(tokenizer, continued=True)

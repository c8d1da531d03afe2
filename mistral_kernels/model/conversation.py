"""A conversation with a chat model, whose cache is kept from turn to turn.

Every turn encodes the whole history anew, since a chat format may change ids it gave before: some
put the system prompt before the last message of all, and an answer, once it is text, may be split
into other tokens than those it was drawn as. The ids that the cache holds and that have not changed
stay there; only what follows them is fed:

    turn 1:  ids     <s> [INST] Hi [/INST]              all are fed; drawn: Hello !  </s>
             cached  <s> [INST] Hi [/INST] Hello !
    turn 2:  ids     <s> [INST] Hi [/INST] Hello ! </s> [INST] Why? [/INST]
                     `------------ reused ------' `-------- fed ---------'
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mistral_kernels.model.generate import Event, stream
from mistral_kernels.model.tokenizer import TextStream, Tokenizer
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.ops.checks import is_int

DEFAULT_CONTEXT = 8192  # where a model could hold more, a cache for all of it may fill the memory


class Conversation:
    """What a user and a model have said, and the model's cache of it.

    Args:
        model: answers; its weights must not change while the conversation lasts.
        tokenizer: the model's.
        system: what the model is told before all else; None: nothing.
        context: most tokens the conversation may reach, marks of the chat format included; None:
            the model's `max_positions`, at most 8192.
        lookahead: tokens that can be taken back from a window's ring when an answer, encoded, is
            not what was drawn; where more have to be, the whole history is fed again. Layers
            without a window can always take back.

    Attributes:
        messages: the turns, each a user's and an assistant's message with "role" and "content".
            They may be changed between turns: the cache follows.
        context: see above.
        cache: the KVCache.
        tokens_fed, tokens_reused: tokens of the present turn's prompt that were fed, and that the
            cache held already.
        tokens_drawn: tokens of its answer so far.
        finish_reason: how its answer ended: "stop", or "length" where it was cut; None: not yet, or
            it was broken off.

    Raises:
        TypeError, ValueError: an argument is out of range, or the tokenizer cannot encode a
            conversation, or none with a system prompt.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        context: int | None = None,
        lookahead: int = 1024,
    ):
        if context is None:
            context = min(model.config.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if not is_int(context):
            raise TypeError(f"Conversation: context must be an int, got {type(context).__name__}")
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self._system = [] if system is None else [_message("system", system)]
        # What is true of any conversation is told now: that the format has no chat at all or no
        # system prompt, or that this one leaves no room for a question.
        shortest = len(tokenizer.encode_chat([*self._system, _message("user", "?")]))
        if context < shortest:
            raise ValueError(
                f"Conversation: context must be >= {shortest}, the tokens of the system prompt and"
                f" of a question of one character, got {context}"
            )
        self.cache = model.new_cache(1, context, lookahead=lookahead)
        self._answer: Iterator[str] | None = None
        self.reset()

    @property
    def system(self) -> str | None:
        return self._system[0]["content"] if self._system else None

    def reset(self) -> None:
        """Forgets all that was said, but not the system prompt."""
        self._end_answer()
        self.cache.reset()
        self.messages: list[dict[str, str]] = []
        # Ids of the present turn, as far as they are known. The cache holds the first of them.
        self._ids: list[int] = []
        self.tokens_fed = self.tokens_reused = self.tokens_drawn = 0
        self.finish_reason: str | None = None

    def reply(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        chunk_size: int | None = None,
    ) -> Iterator[str]:
        """Says `text` to the model.

        The turn enters `messages` with the first text of the answer and grows with it, so whoever
        stops reading has in the history what was read. A turn whose answer has no text is not kept.
        A reply that is not read to its end is closed by the next one; one that an exception
        breaks off (Ctrl-C anywhere, too) leaves a conversation that can go on.

        Args:
            text: the user's message.
            max_tokens: most tokens of the answer; None, or more than fit: up to the end of
                the context.
            temperature, top_p, top_k, seed, chunk_size: see `mistral_kernels.generate`.

        Yields:
            The answer: for each token the text that it completes, which may be empty.

        Raises:
            TypeError, ValueError: an argument is out of range, the tokenizer cannot encode such a
                conversation, or it outgrows the context. Raised at the call, before anything is
                fed; the history is as before.
            RuntimeError: the model's logits are not finite.
        """
        if max_tokens is not None and not is_int(max_tokens):
            raise TypeError(f"reply: max_tokens must be an int, got {type(max_tokens).__name__}")
        self._end_answer()
        ids = self.tokenizer.encode_chat([*self._system, *self.messages, _message("user", text)])
        room = self.context - len(ids) + 1  # the last token drawn is not fed
        if room < 1:
            raise ValueError(
                f"reply: the conversation would reach {len(ids)} tokens, but its context is"
                f" {self.context}"
            )
        limit = room if max_tokens is None else min(max_tokens, room)
        kept = self._cut_cache(ids)
        events = stream(
            [ids[kept:]],
            self.model,
            max_tokens=limit,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            chunk_size=chunk_size,
            eos_id=self.tokenizer.eos_id,
            cache=self.cache,
        )
        self._ids = ids
        self.tokens_fed, self.tokens_reused, self.tokens_drawn = len(ids) - kept, kept, 0
        self.finish_reason = None
        self._answer = self._speak(text, events, limit)
        return self._answer

    def _speak(self, user: str, events: Iterator[Event], limit: int) -> Iterator[str]:
        """Yields the answer's text, and keeps the history and the known ids up to date."""
        question, answer = _message("user", user), _message("assistant", "")
        text = TextStream(self.tokenizer)
        for _, token, _ in events:
            self._ids.append(token)
            self.tokens_drawn += 1
            yield self._say(question, answer, text.push(token))
        self.finish_reason = "length" if self.tokens_drawn == limit else "stop"
        if rest := text.finish():
            yield self._say(question, answer, rest)

    def _say(self, question: dict[str, str], answer: dict[str, str], piece: str) -> str:
        begins = piece and not answer["content"]
        answer["content"] += piece
        if begins:  # and not before: an answer without text is no turn, wherever Ctrl-C comes
            self.messages += [question, answer]
        return piece

    def _cut_cache(self, ids: list[int]) -> int:
        """Takes from the cache all that `ids` do not begin with; returns how many ids stay."""
        held = self.cache.lengths[0]
        # At least one token is fed: the logits of those in the cache are gone.
        kept = min(_common_prefix(self._ids[:held], ids), len(ids) - 1)
        try:
            self.cache.rollback(held - kept)
        except ValueError:  # a ring has lost keys that the next token must see
            self.cache.reset()
        return self.cache.lengths[0]

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))

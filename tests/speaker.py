"""Random models that talk, in the embedded tokenizer's words, and what is said of their answers.

Where an answer is to come back from its text as the tokens it was drawn as, the model has a say in
whole words only; other models draw anything, bytes and control tokens too.
"""

import pytest
import torch
from tiny_models import random_model

from mistral_kernels import Transformer, generate
from mistral_kernels.model.conversation import Conversation
from mistral_kernels.model.tokenizer import Tokenizer

QUESTIONS = ["hello", "what is a bell?", "and a dog", "why", "thank you"]


def speaker(
    tokenizer: Tokenizer, *, words: bool, dtype: torch.dtype = torch.float32, **shape
) -> Transformer:
    """A random model for this tokenizer, which draws whole words only if `words`."""
    model = random_model(vocab=tokenizer.vocab, dtype=dtype, **shape)
    if words:
        spoken = torch.zeros(tokenizer.vocab, 1, dtype=dtype)
        spoken[[token for token in range(300, 1500) if is_word(tokenizer, token)]] = 1
        model.output.mul_(spoken)
    return model


def is_word(tokenizer: Tokenizer, token: int) -> bool:
    text = tokenizer.decode([tokenizer.bos_id, token]).strip()
    return text.isalpha() and tokenizer.encode(text, bos=False) == [token]


class Listener:
    """Notes the ids that a model is fed, and the logits of each call's last one."""

    def __init__(self, model: Transformer, monkeypatch: pytest.MonkeyPatch):
        self.ids: list[int] = []
        self.logits: list[torch.Tensor] = []
        forward = model.forward

        def listening(input_ids, seqlens, cache=None, **options):
            logits = forward(input_ids, seqlens, cache, **options)
            self.ids += input_ids.tolist()
            self.logits.append(logits[-1])
            return logits

        monkeypatch.setattr(model, "forward", listening)


def history(conversation: Conversation, question: str) -> list[int]:
    """The ids of all that was said, with the next question."""
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    messages = [*system, *conversation.messages, {"role": "user", "content": question}]
    return conversation.tokenizer.encode_chat(messages)


def assert_as_if_fresh(conversation: Conversation, question: str, max_tokens: int = 9) -> list[int]:
    """Say something, and check the answer against one on a fresh cache; returns its tokens."""
    prompt, tokenizer = history(conversation, question), conversation.tokenizer
    (expected,), _ = generate(
        [prompt], conversation.model, max_tokens=max_tokens, eos_id=tokenizer.eos_id
    )
    answer = "".join(conversation.reply(question, max_tokens=max_tokens))
    assert conversation.tokens_fed + conversation.tokens_reused == len(prompt)
    assert (answer, conversation.tokens_drawn) == (tokenizer.decode(expected), len(expected))
    return expected

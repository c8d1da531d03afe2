"""What the tests of `mistral-kernels chat` share: how it is run, and what it must have answered."""

import itertools
import json
import sys
from functools import cache
from pathlib import Path

import torch

from mistral_kernels import Transformer, generate
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.tokenizer import Tokenizer

COMMAND = [sys.executable, "-m", "mistral_kernels.cli", "chat"]
GREEDY = ["--device", "cpu", "--dtype", "float32", "--temperature", "0"]


def said(path: Path) -> list[str]:
    """The contents of a saved conversation."""
    return [message["content"] for message in json.loads(path.read_text())["messages"]]


def answer_to(spoken: list[str], folder: Path, *, system: str = "", max_tokens: int = 60) -> str:
    """What the model answers to messages of the user and itself in turn, on a cache of its own."""
    model = Transformer.from_folder(folder, device="cpu", dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(folder)
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": r, "content": text} for r, text in zip(roles, spoken, strict=False)]
    ids = tokenizer.encode_chat(messages)
    tokens = generate([ids], model, max_tokens=max_tokens, eos_id=tokenizer.eos_id)[0][0]
    return tokenizer.decode(tokens)


@cache
def hello_and_bell() -> list[str]:
    """The embedded model's greedy answers to "hello" and then "bell:"."""
    first = answer_to(["hello"], TINY_MIXTRAL)
    return [first, answer_to(["hello", first, "bell:"], TINY_MIXTRAL)]

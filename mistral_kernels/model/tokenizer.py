"""Text to token ids and back, with the tokenizer file that lies beside a checkpoint.

The library that reads the file encodes. Decoding is done here, one token at a time, because text
is shown while it is generated: a character may take several byte tokens, and a SentencePiece piece
carries the space before its word, which only the first piece of a text drops.
"""

from __future__ import annotations

import codecs
import logging
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from mistral_kernels.model.chat_format import (
    Messages,
    check_conversation,
    check_unicode,
    find_chat_template,
)
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.hub import resolve_folder
from mistral_kernels.model.layouts import CONFIG_FILES
from mistral_kernels.model.mistral_tokens import REPLACEMENT, SentencePieceTokens, TekkenTokens
from mistral_kernels.model.tokenizer_files import tokenizer_files
from mistral_kernels.model.tokenizer_json import JsonTokens

logger = logging.getLogger("mistral_kernels")


class Tokens(Protocol):
    """The tokens of one kind of file: what a Tokenizer asks of the library that reads it.

    Attributes:
        kind, version, vocab, bos_id, eos_id, add_bos, chat_refusal: see `Tokenizer`.
        byte_errors: name of the codec error handler for bytes that are no UTF-8.
    """

    kind: str
    version: str | None
    vocab: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    chat_refusal: str | None
    byte_errors: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, control tokens in it spelled out."""

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of a checked conversation; a ValueError names the file that refuses it."""

    def is_control(self, token: int) -> bool:
        """Return whether a token, one of `vocab`, stands for no text."""

    def token_bytes(self, token: int, at_start: bool) -> bytes | None:
        """Return the UTF-8 bytes of a token that is no control token, None if it does not exist.

        A space that its piece brings along is dropped `at_start` of a text.
        """


class Tokenizer:
    """A checkpoint's tokenizer: SentencePiece (v1 to v7), Tekken or Hugging Face's tokenizer.json.

    Attributes:
        path: the file it was read from.
        kind: "sentencepiece", "tekken" or "tokenizers", after the library that has the format.
        version: mistral-common's version of the chat format, such as "v3"; None for tokenizer.json.
        vocab: number of token ids.
        bos_id, eos_id: ids that begin and end a text; None if a tokenizer.json has none.
        add_bos: whether a text begins with bos_id.
        chat_refusal: why there is no chat with this tokenizer, and which file would help; None if
            there is.

    Args:
        path: a tekken.json, tokenizer.model or tokenizer.json file; the files that explain the last
            one are looked for beside it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no tokenizer; names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        if self.path.suffix != ".json":
            self._tokens: Tokens = SentencePieceTokens(self.path)
        elif "tekken" in self.path.name:
            self._tokens = TekkenTokens(self.path)
        else:
            self._tokens = JsonTokens(self.path)
        self.kind = self._tokens.kind
        self.version = self._tokens.version
        self.vocab = self._tokens.vocab
        self.bos_id = self._tokens.bos_id
        self.eos_id = self._tokens.eos_id
        self.add_bos = self._tokens.add_bos
        self.chat_refusal = self._tokens.chat_refusal

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig | None = None) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        `tokenizer_files` says which file that is. Where tekken.json and a SentencePiece file lie
        side by side, the model decides: the one whose vocabulary is the model's is taken, else
        the only one that fits into it. tekken.json is taken if both are of one size. Either choice
        is logged as a warning.

        Args:
            folder: path of the checkpoint, or a model of the Hugging Face hub as `resolve_folder`
                takes it; its weights are not downloaded.
            config: the model's configuration; None reads the folder's, should it matter.

        Raises:
            OSError: there is no tokenizer; names the file names that were looked for. Or it cannot
                be downloaded.
            ValueError: a file is damaged, or two disagree and the model's vocabulary does not
                settle which one is its; names the files.
        """
        folder = resolve_folder(folder, weights=False)
        found = [cls(path) for path in tokenizer_files(folder)]
        return found[0] if len(found) == 1 else _settle(*found, folder, config)

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template lies in the folder, which marks a chat model.

        Raises:
            ValueError: a file that may hold it is damaged; names the file.
        """
        return find_chat_template(self.path.parent) is not None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the token ids of `text`, after the begin-of-text id if `bos` and `add_bos`.

        Control tokens spelled out in the text, such as "[INST]", are encoded as plain text.

        Raises:
            TypeError: text is no string.
            ValueError: it has half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: text must be a string, got {type(text).__name__}")
        check_unicode(text, "encode: text")
        begin = [self.bos_id] if bos and self.add_bos else []
        return begin + self._tokens.encode(text)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's next answer.

        mistral-common's files have their version's chat format, tokenizer.json its folder's chat
        template. In a template's text control tokens are control tokens whoever wrote them, as in
        transformers; mistral-common encodes those in a message as plain text.

        A longer conversation need not begin with the ids of a shorter one and of the answer that
        the model gave to it. v2 and v3 move the system prompt to the last user message; from v2 on
        an answer loses the spaces at its end; and a text may be sampled in other tokens than the
        ones it is encoded in. What a template does is its own affair. An answer's text is that of
        a TextStream that is not `continued`, else a SentencePiece answer gains a space.

        Args:
            messages: each with "role" (system, user or assistant) and "content", a text; the last
                is the user's. Empty answers are refused by mistral-common.

        Returns:
            The ids, from the begin-of-text id on.

        Raises:
            TypeError: messages is not a list.
            ValueError: there is no chat with this tokenizer (see `chat_refusal`), or the messages
                are not a conversation that the format knows.
        """
        if self.chat_refusal:
            raise ValueError(self.chat_refusal)
        return self._tokens.encode_chat(check_conversation(messages))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; `TextStream` says what control tokens and bad bytes become.

        Raises:
            TypeError: an id is no integer.
        """
        stream = TextStream(self)
        return "".join([*map(stream.push, ids), stream.finish()])

    def check_fits(self, config: ModelConfig) -> None:
        """Check that the model has an embedding for every token id; fewer tokens are only logged.

        Raises:
            ValueError: the tokenizer has more tokens than the model; names both numbers.
        """
        if self.vocab > config.vocab:
            raise ValueError(
                f"{self.path}: {self.vocab} tokens do not fit a model of vocab {config.vocab}"
            )
        if self.vocab < config.vocab:
            logger.info(
                "%s has %d tokens, the model's vocab is %d", self.path, self.vocab, config.vocab
            )


def _settle(
    tekken: Tokenizer, sentencepiece: Tokenizer, folder: Path, config: ModelConfig | None
) -> Tokenizer:
    """The one of two tokenizers that is the model's, see `Tokenizer.from_folder`."""
    both = (tekken, sentencepiece)
    if config is None and any((folder / name).is_file() for name in CONFIG_FILES.values()):
        config = ModelConfig.from_folder(folder)
    same_size = tekken.vocab == sentencepiece.vocab
    if same_size or config is None:
        suited = [tekken] if same_size else []
    else:
        suited = [one for one in both if one.vocab == config.vocab]
        suited = suited or [one for one in both if one.vocab <= config.vocab]
    if len(suited) != 1:
        vocab = "unknown" if config is None else config.vocab
        raise ValueError(
            f"{folder}: {tekken.path.name} has {tekken.vocab} tokens, {sentencepiece.path.name} has"
            f" {sentencepiece.vocab}, the model's vocab is {vocab}: delete the one that is not the"
            " model's, or in Python set model.tokenizer = Tokenizer(path)"
        )
    logger.warning(
        "%s: both %s and %s are there; %s is read",
        folder,
        *(one.path.name for one in (*both, suited[0])),
    )
    return suited[0]


class TextStream:
    """Turns tokens into text as they arrive: what `push` returns, joined, is the text of them all.

    A character whose bytes are not all there is held back until they are. Control tokens are
    silent; bytes that are no UTF-8 and ids that the tokenizer lacks become U+FFFD.

    Args:
        tokenizer: whose ids are pushed.
        continued: whether the text follows another one (a prompt), so that a space that its first
            piece brings along is kept: text of the prompt + text of the stream = the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, *, continued: bool = False):
        self._tokens = tokenizer._tokens
        self._at_start = not continued
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._tokens.byte_errors)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, which may be empty."""
        token = operator.index(token)  # numpy's and torch's integers too
        known = 0 <= token < self._tokens.vocab
        if known and self._tokens.is_control(token):
            return self.finish()
        at_start, self._at_start = self._at_start, False
        data = self._tokens.token_bytes(token, at_start) if known else None
        return self.finish() + REPLACEMENT if data is None else self._utf8.decode(data)

    def finish(self) -> str:
        """Return what is held back: an unfinished character shows as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

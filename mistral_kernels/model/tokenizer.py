"""Text to token ids and back, with the tokenizer file that lies beside a checkpoint.

mistral-common reads the files and encodes. Decoding is done here, one token at a time, because text
is shown while it is generated: a character may take several byte tokens, and a SentencePiece piece
carries the space before its word, which only the first piece of a text drops.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mistral_common.exceptions import MistralCommonException, TokenizerException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from pydantic import ValidationError

from mistral_kernels.model.config import ModelConfig

logger = logging.getLogger("mistral_kernels")

TEKKEN = "tekken.json"
SENTENCEPIECE = "tokenizer.model"
FILE_NAMES = f"{TEKKEN}, {SENTENCEPIECE}.v* or {SENTENCEPIECE}"
# What mistral-common raises for a file that is no tokenizer.
LOAD_ERRORS = (
    TokenizerException,
    RuntimeError,
    OSError,
    AssertionError,
    LookupError,
    TypeError,
    ValueError,
)

REPLACEMENT = "\ufffd"
SPACE = "\u2581"  # SentencePiece's mark for a space.
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

# SentencePiece shows a replacement character for each bad byte, Python's handler for each bad run.
codecs.register_error(
    "mistral_kernels.replace_each_byte", lambda error: (REPLACEMENT, error.start + 1)
)


def find_tokenizer(folder: str | Path) -> Path:
    """Return the tokenizer file of a checkpoint folder.

    tekken.json wins over tokenizer.model.v*, the highest version of that wins over a lower one, and
    any of them over a plain tokenizer.model, which mistral-common reads as v1.

    Raises:
        FileNotFoundError: there is none; names the file names that were looked for.
    """
    folder = Path(folder)
    if (folder / TEKKEN).is_file():
        return folder / TEKKEN
    versioned = {}
    for path in folder.glob(f"{SENTENCEPIECE}.v*"):
        if match := re.fullmatch(r"v(\d+)(?:m(\d+))?", path.suffix[1:]):
            versioned[int(match[1]), int(match[2] or 0)] = path
    if versioned:
        return versioned[max(versioned)]
    if (folder / SENTENCEPIECE).is_file():
        return folder / SENTENCEPIECE
    raise FileNotFoundError(
        f"{folder}: no tokenizer (looked for {FILE_NAMES}); text needs one, while token ids work"
        " without: see mistral_kernels.generate in Python"
    )


class Tokenizer:
    """A checkpoint's tokenizer: SentencePiece (v1 to v7) or Tekken.

    Attributes:
        path: the file it was read from.
        version: mistral-common's version of the chat format, such as "v3".
        vocab: number of token ids.
        bos_id, eos_id: ids that begin and end a text.

    Args:
        path: a tekken.json or tokenizer.model file.

    Raises:
        ValueError: the file is no tokenizer; names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        load = Tekkenizer.from_file if self.path.suffix == ".json" else SentencePieceTokenizer
        try:
            self._tokens = load(self.path)
        except LOAD_ERRORS as error:
            raise ValueError(f"{self.path}: not a tokenizer file: {error}") from error
        self.version: str = self._tokens.version.value
        self.vocab: int = self._tokens.n_words
        self.bos_id: int = self._tokens.bos_id
        self.eos_id: int = self._tokens.eos_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, chosen by `find_tokenizer`."""
        return cls(find_tokenizer(folder))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the token ids of `text`, after the begin-of-text id if `bos`.

        Control tokens spelled out in the text, such as "[INST]", are encoded as plain text.
        """
        return self._tokens.encode(text, bos=bos, eos=False)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's next answer.

        Args:
            messages: each with "role" (system, user or assistant) and "content"; the last is the
                user's.

        Returns:
            The ids, from the begin-of-text id on, in the chat format of `version`.

        Raises:
            ValueError: the messages are not a conversation that the format knows.
        """
        try:
            request = ChatCompletionRequest(messages=[dict(message) for message in messages])
            return MistralTokenizer.from_file(self.path).encode_chat_completion(request).tokens
        except (MistralCommonException, ValidationError) as error:
            raise ValueError(f"{self.path}: not a conversation: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; `TextStream` says what control tokens and bad bytes become."""
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
        self._vocab = tokenizer.vocab
        self._tekken = isinstance(self._tokens, Tekkenizer)
        self._at_start = not continued
        errors = "replace" if self._tekken else "mistral_kernels.replace_each_byte"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, which may be empty."""
        known = 0 <= token < self._vocab
        if known and self._tokens.is_special(token):
            return self.finish()
        at_start, self._at_start = self._at_start, False
        if not known:
            return self.finish() + REPLACEMENT
        data = self._bytes(token)
        if data is not None:
            return self._utf8.decode(data)
        return self.finish() + self._piece(token, at_start)

    def finish(self) -> str:
        """Return what is held back: an unfinished character shows as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _bytes(self, token: int) -> bytes | None:
        """The bytes of a byte-level token, None for a SentencePiece piece, which is whole text."""
        if self._tekken:
            return self._tokens.id_to_byte_piece(token)
        match = BYTE_PIECE.fullmatch(self._tokens.id_to_piece(token))
        return bytes.fromhex(match[1]) if match else None

    def _piece(self, token: int, at_start: bool) -> str:
        if token == self._tokens.unk_id:
            return self._tokens.decode([token])
        piece = self._tokens.id_to_piece(token)
        return (piece.removeprefix(SPACE) if at_start else piece).replace(SPACE, " ")

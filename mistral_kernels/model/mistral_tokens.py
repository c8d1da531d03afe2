"""Tokens of the files that mistral-common reads: SentencePiece (tokenizer.model*) and Tekken."""

import codecs
import re
from pathlib import Path

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

# What mistral-common raises for a file that is no tokenizer.
LOAD_ERRORS = (
    MistralCommonException,
    RuntimeError,
    OSError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
REPLACEMENT = "\ufffd"
REPLACE_EACH_BYTE = "mistral_kernels.replace_each_byte"
SPACE = "\u2581"  # SentencePiece's mark for a space.
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

# SentencePiece shows a replacement character for each bad byte, Python's handler for each bad run.
codecs.register_error(REPLACE_EACH_BYTE, lambda error: (REPLACEMENT, error.start + 1))


class _MistralCommonTokens:
    """What both kinds share: one MistralTokenizer, which holds the tokens and the chat format.

    Args:
        path: a tekken.json or tokenizer.model file.

    Raises:
        ValueError: the file is no tokenizer; names the file.
    """

    chat_refusal: str | None = None
    add_bos = True

    def __init__(self, path: Path):
        try:
            self._chat = MistralTokenizer.from_file(path)
        except LOAD_ERRORS as error:
            # An assertion may say nothing, or print the whole vocabulary.
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path}: not a tokenizer file: {reason:.300}") from error
        self._path = path
        self._tokens = self._chat.instruct_tokenizer.tokenizer
        self.version: str | None = self._tokens.version.value
        self.vocab: int = self._tokens.n_words
        self.bos_id: int | None = self._tokens.bos_id
        self.eos_id: int | None = self._tokens.eos_id

    def encode(self, text: str) -> list[int]:
        return self._tokens.encode(text, bos=False, eos=False)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            request = ChatCompletionRequest(messages=messages)
            return self._chat.encode_chat_completion(request).tokens
        # pydantic's ValidationError is a ValueError.
        except (MistralCommonException, ValueError) as error:
            raise ValueError(f"{self._path}: not a conversation: {error}") from error

    def is_control(self, token: int) -> bool:
        return self._tokens.is_special(token)


class SentencePieceTokens(_MistralCommonTokens):
    """Pieces of text, and a token for each byte of what no piece covers."""

    kind = "sentencepiece"
    byte_errors = REPLACE_EACH_BYTE

    def __init__(self, path: Path):
        super().__init__(path)
        # mistral-common reads a name without a version as v1, whose marks are text.
        if path.suffix == ".model" and self._tokens.is_special("[INST]"):
            self.chat_refusal = (
                f"{path}: chat needs the version of this tokenizer, which is later than v1: give"
                f" it its name, such as {path.name}.v3, or lay its tokenizer.json and chat template"
                " beside it"
            )

    def token_bytes(self, token: int, at_start: bool) -> bytes:
        piece = self._tokens.id_to_piece(token)
        if match := BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(match[1])
        if token == self._tokens.unk_id:
            return self._tokens.decode([token]).encode()
        return (piece.removeprefix(SPACE) if at_start else piece).replace(SPACE, " ").encode()


class TekkenTokens(_MistralCommonTokens):
    """Runs of bytes."""

    kind = "tekken"
    byte_errors = "replace"

    def token_bytes(self, token: int, at_start: bool) -> bytes:
        return self._tokens.id_to_byte_piece(token)

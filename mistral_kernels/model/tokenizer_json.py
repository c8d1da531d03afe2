"""Tokens of a Hugging Face tokenizer.json, read by the `tokenizers` library.

The file holds the vocabulary and how text is cut. Which token begins and which ends a text is told
by the files beside it, and so is the chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from mistral_kernels.model.chat_format import TEMPLATE_FILES, check_unicode, find_chat_template
from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.mistral_tokens import BYTE_PIECE, REPLACE_EACH_BYTE

# Files that name special tokens, the last one wins; and files that number them, the first one wins.
NAMING_FILES = ("special_tokens_map.json", "tokenizer_config.json")
NUMBERING_FILES = ("generation_config.json", "config.json")
USUAL_NAMES = {"bos": "<s>", "eos": "</s>"}


class JsonTokens:
    """Byte-level tokens, or pieces of text with a token for each byte of what no piece covers.

    Args:
        path: a tokenizer.json file.

    Raises:
        ValueError: it or a file beside it is damaged, or they contradict each other; names the
            file.
    """

    kind = "tokenizers"
    version: str | None = None

    def __init__(self, path: Path):
        self._backend = _read(path)
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(f"{path}: not a tokenizer file: it has no tokens")
        self.vocab = max(ids) + 1
        folder = path.parent
        config = _optional_json(folder / "tokenizer_config.json")
        self._names = _named_tokens(folder)
        self.bos_id = self._end("bos", path)
        self.eos_id = self._end("eos", path)
        self.add_bos = self._adds_bos(config.get("add_bos_token"))
        self._template = find_chat_template(folder)
        self.chat_refusal = (
            None if self._template else f"{folder}: chat needs a chat template: {TEMPLATE_FILES}"
        )
        added = self._backend.get_added_tokens_decoder()
        self._control = {token for token, entry in added.items() if entry.special}
        # Asked of the decoder, which may be any chain of steps.
        byte_level = self._decode(["\u0120"]) == " "
        self._byte_alphabet = _byte_alphabet() if byte_level else {}
        self._byte_pieces = self._decode(["<0x41>"]) == "A"
        self.byte_errors = "replace" if byte_level else REPLACE_EACH_BYTE

    def encode(self, text: str) -> list[int]:
        self._backend.encode_special_tokens = True  # as text, that is
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._template.render(messages, self._names)
        self._backend.encode_special_tokens = False
        return self._backend.encode(text, add_special_tokens=False).ids

    def is_control(self, token: int) -> bool:
        return token in self._control

    def token_bytes(self, token: int, at_start: bool) -> bytes | None:
        piece = self._backend.id_to_token(token)
        if piece is None:
            return None
        if self._byte_alphabet:
            known = all(character in self._byte_alphabet for character in piece)
            return bytes(map(self._byte_alphabet.get, piece)) if known else piece.encode()
        match = BYTE_PIECE.fullmatch(piece) if self._byte_pieces else None
        if match and int(match[1], 16) >= 0x80:
            return bytes.fromhex(match[1])
        # The decoder may drop the space before the first piece, and only before that.
        before = "" if at_start else "x"
        return self._decode([before, piece] if before else [piece])[len(before) :].encode()

    def _decode(self, pieces: list[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(pieces) if decoder is None else decoder.decode(pieces)  # as `tokenizers`

    def _end(self, end: str, path: Path) -> int | None:
        """The id of the token that begins ("bos") or ends ("eos") a text, made a special one."""
        key = f"{end}_token"
        number, source = _numbered_token(path.parent, f"{key}_id")
        if key in self._names:
            source = " or ".join(NAMING_FILES)
            number = self._backend.token_to_id(self._names[key])
            if number is None:
                raise ValueError(f"{path}: has no token {self._names[key]!r}, {key} of {source}")
        elif number is None:
            number = self._backend.token_to_id(USUAL_NAMES[end])
        if number is None:
            return None
        text = self._backend.id_to_token(number)
        if text is None:
            raise ValueError(f"{path}: has no token of id {number}, {key}_id of {source}")
        self._names[key] = text
        added = self._backend.get_added_tokens_decoder().get(number)
        if added is None or not added.special:
            self._backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        return number

    def _adds_bos(self, stated: Any) -> bool:
        """Whether a text is to begin with the begin-of-text token: the file does it, or it is said.

        Told not to, the file does it all the same in transformers.
        """
        return self.bos_id is not None and (
            stated is True or self._backend.encode("").ids[:1] == [self.bos_id]
        )


def _read(path: Path) -> Backend:
    try:
        # Not from_file, which raises a bare Exception for whatever is wrong.
        backend = Backend.from_buffer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer file: {error}") from error
    # Some files were saved while they cut or filled texts for training.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that the folder names, such as {"bos_token": "<s>"}."""
    names = {}
    for file in NAMING_FILES:
        for key, token in _optional_json(folder / file).items():
            text = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(text, str):
                check_unicode(text, f"{folder / file}: {key}")
                names[key] = text
    return names


def _numbered_token(folder: Path, key: str) -> tuple[int | None, str]:
    """The id that a configuration file has under a key, the first of several, and the file."""
    for file in NUMBERING_FILES:
        config = _optional_json(folder / file)
        for section in (config, config.get("text_config")):
            number = section.get(key) if isinstance(section, dict) else None
            number = number[0] if isinstance(number, list) and number else number
            if number is None:
                continue
            if type(number) is not int or number < 0:
                raise ValueError(f"{folder / file}: {key}: expected a token id, got {number!r:.80}")
            return number, file
    return None, ""


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokens are written in, each with its byte.

    Printable bytes of Latin-1 are themselves; the others follow from U+0100 on, in order.
    """
    characters = sorted(ByteLevel.alphabet())
    themselves = [ord(character) for character in characters if ord(character) < 0x100]
    others = sorted(set(range(0x100)).difference(themselves))
    return dict(zip(characters, themselves + others, strict=True))

"""Which file of a checkpoint folder holds its tokenizer."""

import re
from pathlib import Path

from mistral_kernels.model.chat_format import find_chat_template

TEKKEN = "tekken.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZERS = "tokenizer.json"
FILE_NAMES = f"{TEKKEN}, {SENTENCEPIECE}.v*, {SENTENCEPIECE} or {TOKENIZERS}"


def tokenizer_files(folder: str | Path) -> list[Path]:
    """Return the tokenizer files of a checkpoint folder that have a say, the first one first.

    A folder's own tokenizer is tekken.json or a SentencePiece file: tokenizer.model.v* (the highest
    version of several) rather than a plain tokenizer.model. Where both kinds lie side by side, both
    are returned. tokenizer.json counts where there is neither, and where a chat template lies
    with it and with a plain tokenizer.model: that one's name tells neither the chat format nor
    that a fine-tune added tokens, which the template and tokenizer.json do.

    Args:
        folder: path of the checkpoint.

    Returns:
        One path, or those of tekken.json and of a SentencePiece file.

    Raises:
        FileNotFoundError: there is none; names the file names that were looked for.
        ValueError: a file that may hold the chat template is damaged.
    """
    folder = Path(folder)
    tekken, plain, hugging_face = (
        [path] if path.is_file() else []
        for path in (folder / TEKKEN, folder / SENTENCEPIECE, folder / TOKENIZERS)
    )
    versioned = _versioned(folder)
    if not tekken and not versioned and plain and hugging_face and find_chat_template(folder):
        return hugging_face
    found = tekken + (versioned or plain) or hugging_face
    if not found:
        raise FileNotFoundError(
            f"{folder}: no tokenizer (looked for {FILE_NAMES}); text needs one, while token ids"
            " work without: see mistral_kernels.generate in Python"
        )
    return found


def _versioned(folder: Path) -> list[Path]:
    """The tokenizer.model.v* of the highest version, such as v3 or v7m1, if there is one."""
    versions = {}
    for path in folder.glob(f"{SENTENCEPIECE}.v*"):
        if match := re.fullmatch(r"v(\d+)(?:m(\d+))?", path.suffix[1:]):
            versions[int(match[1]), int(match[2] or 0)] = path
    return [versions[max(versions)]] if versions else []

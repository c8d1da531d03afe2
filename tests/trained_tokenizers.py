"""Small tokenizers in the forms that checkpoints come in, made on the spot."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

import mistral_kernels

SHIPPED = Path(mistral_common.__file__).parent / "data"
TEKKEN = SHIPPED / "tekken_240718.json"
TINY = Path(mistral_kernels.__file__).parent / "tiny_mixtral" / "tokenizer.model.v1"
CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
TEXTS = [
    "The quick brown fox.",
    "  two  spaces, a\ttab\nand a line ",
    "Français, Größe, naïve",
    "Привет, мир. Ελληνικά",
    "你好，世界 日本語 한국어",
    "العربية עברית हिन्दी ไทย",
    "🙂 👩‍👩‍👧‍👦 𝔘𝔫𝔦 é",
    "\ufffd \x00 [INST] </s>",
]


def begins(backend: Backend, bos: str) -> Backend:
    """Make the post-processor put the begin-of-text token before a text, as published files do."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def byte_level() -> Backend:
    """Tekken's form in a tokenizer.json: its split, byte-level BPE, control tokens first."""
    return Backend.from_str(_trained())


@cache
def _trained() -> str:
    backend = Backend(BPE())
    pattern = json.loads(TEKKEN.read_text(encoding="utf-8"))["config"]["pattern"]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 2, trainer)
    return begins(backend, "<s>").to_str()


def sentencepiece_form(form: str = "metaspace", control: Sequence[str] = CONTROL) -> Backend:
    """The embedded tokenizer as a tokenizer.json: "metaspace" as in v0.3, "prepend" as in v0.1.

    A SentencePiece BPE merges the pair whose result has the lowest id first.
    """
    model = SentencePieceProcessor(model_file=str(TINY))
    vocab = {model.id_to_piece(token): token for token in range(model.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not model.IsControl(vocab[piece])
    ]
    backend = Backend(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([special(text) for text in control])
    return begins(backend, "<s>")


def write_folder(folder: Path, backend: Backend, **config: object) -> Path:
    """Write tokenizer.json and tokenizer_config.json with these keys; return the folder."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_tekken(path: Path, version: str = "v3", tokens: int = 2000) -> Path:
    """Write the first tokens of a published tekken.json as one of this version; return the path."""
    values = json.loads(TEKKEN.read_text(encoding="utf-8"))
    values["config"] |= {"version": version, "default_vocab_size": 1000 + tokens}
    values["vocab"] = values["vocab"][:tokens]
    if version != "v3":
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"]
        names += ["[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"]
        names += ["[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]
        names += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]"]
        names += ["[THINK]", "[/THINK]"] if version == "v13" else []
        values["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
    path.write_text(json.dumps(values), encoding="utf-8")
    return path

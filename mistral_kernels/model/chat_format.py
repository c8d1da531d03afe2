"""Conversations: what one is, and the chat template of a Hugging Face folder that writes it out.

A chat template is a Jinja program that comes with a checkpoint, so it runs in Jinja's sandbox. It
sees what transformers shows it, for that is what it was written for.
Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mistral_kernels.model.json_fields import read_json

JINJA_FILE = "chat_template.jinja"
# Both hold the template under the key "chat_template".
JSON_FILES = ("tokenizer_config.json", "chat_template.json")
TEMPLATE_FILES = f"{JINJA_FILE}, or chat_template in {' or '.join(JSON_FILES)}"
ROLES = ("system", "user", "assistant")
# What a template may end in: its own raise_exception, bad syntax (Python's too, for it is compiled
# to Python), or any slip of its expressions.
RENDER_ERRORS = (
    TemplateError,
    SyntaxError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)

Messages = Sequence[Mapping[str, str]]


def check_unicode(text: str, name: str) -> None:
    """Check that a text, which an error calls `name`, has no half of a surrogate pair.

    Libraries refuse one in words that name nothing, or lose it.

    Raises:
        ValueError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not Unicode text: {error}") from error


def check_conversation(messages: Messages) -> list[dict[str, str]]:
    """Return the messages as plain dictionaries, after checking their form.

    Raises:
        TypeError: messages is not a list.
        ValueError: a message is not a role of `ROLES` with a text; the last is not the user's.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a list of messages, got {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(
                f"messages[{number}]: expected a role and a content, got {message!r:.80}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"messages[{number}]: role: expected {', '.join(ROLES)}, got {message['role']!r}"
            )
        if not isinstance(message["content"], str):
            raise ValueError(
                f"messages[{number}]: content: expected a text, got {message['content']!r:.80}"
            )
        check_unicode(message["content"], f"messages[{number}]: content")
    last = messages[-1]["role"] if messages else None
    if last != "user":
        raise ValueError(f"messages: expected the last one to be the user's, got {last!r}")
    return [dict(message) for message in messages]


class ChatTemplate:
    """A Jinja program that writes a conversation as one text.

    Args:
        source: the program.
        path: the file it was read from, for error messages.
    """

    def __init__(self, source: str, path: Path):
        self.source = source
        self.path = path

    def render(self, messages: list[dict[str, str]], special_tokens: Mapping[str, str]) -> str:
        """Return the conversation as text that ends where the assistant's answer begins.

        Args:
            messages: as `check_conversation` returns them.
            special_tokens: texts that the template knows by name, such as {"bos_token": "<s>"}.

        Raises:
            ValueError: the template is broken or refuses the messages; names its file.
        """
        try:
            template = _environment().from_string(self.source)
            text = template.render(
                **special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
            check_unicode(text, "its text")
        except RENDER_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self.path}: chat template: {reason}") from error
        return text


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a checkpoint folder, None if there is none.

    chat_template.jinja wins over tokenizer_config.json, and that over chat_template.json. Of
    several named templates the one named "default" is taken.

    Raises:
        ValueError: a file is damaged, or holds something else than templates; names the file.
    """
    path = folder / JINJA_FILE
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error
    for path in (folder / name for name in JSON_FILES):
        template = read_json(path).get("chat_template") if path.is_file() else None
        if template is not None:
            return ChatTemplate(_default(template, path), path)
    return None


def _default(template: Any, path: Path) -> str:
    """The template itself, or the default one of a list of {"name": .., "template": ..}."""
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {str(entry.get("name")): entry.get("template") for entry in template}
        template = named.get("default")
        if template is None:
            names = ", ".join(named) or "none"
            raise ValueError(f"{path}: chat_template: no template named default (there: {names})")
    if not isinstance(template, str):
        raise ValueError(f"{path}: chat_template: expected a text, got {template!r:.80}")
    return template


class _Generation(Extension):
    """`{% generation %}`, which marks an answer for training, writes its contents."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter of this name escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)

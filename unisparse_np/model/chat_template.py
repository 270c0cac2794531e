"""Chat templates: from messages to the text that a model was trained to continue.

A template is a small program that comes with the checkpoint, so it is untrusted: it runs in Jinja's immutable sandbox, with
the helpers and options that the templates of published models rely on (`raise_exception`, `strftime_now`, `tojson`,
loop controls, `generation` blocks, trimmed block lines) and with nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, InvalidInput
from .config import read_json_object


class ChatTemplate:
    """One chat template.

    Args:
        source: the template in Jinja's language.
        origin: where it was found, for messages.
    """

    def __init__(self, source: str, origin: str) -> None:
        self.source = source
        self.origin = origin

    def render(self, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, Any]) -> str:
        """The text for `messages` ({"role": ..., "content": ...}), ending where the model's answer begins.

        Raises:
            InvalidInput: the template itself refuses these messages.
            CheckpointError: the template is not valid, fails, or reaches for something outside the sandbox.
        """
        variables = {"tools": None, "documents": None, **special_tokens, "messages": [dict(m) for m in messages]}
        try:
            return _environment().from_string(self.source).render(**variables, add_generation_prompt=True)
        except _Refusal as refusal:
            raise InvalidInput(
                f"the chat template in {self.origin} refuses this conversation ({_one_line(refusal)}): "
                "change the prompt, leave out --system, or use --raw"
            ) from None
        except Exception as error:  # whatever the untrusted program raises ends here
            raise CheckpointError(
                f"the chat template in {self.origin} fails with {type(error).__name__} ({_one_line(error)}): mend it, or use --raw"
            ) from None


def find_chat_template(folder: Path, tokenizer_settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The folder's template, or None: chat_template.jinja comes before chat_template.json and tokenizer_config.json.

    Raises:
        CheckpointError: a template file cannot be read, or a list of named templates has none called `default`.
    """
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.exists():
        return ChatTemplate(_read_text(jinja_file), str(jinja_file))
    json_file = folder / "chat_template.json"
    origin, settings = folder / "tokenizer_config.json", tokenizer_settings
    if json_file.exists():
        origin, settings = json_file, read_json_object(json_file)
    entry = settings.get("chat_template")
    return None if entry is None else ChatTemplate(_default_template(entry, origin), str(origin))


def _default_template(entry: object, origin: Path) -> str:
    """A template is a string, a list of {"name", "template"}, or a mapping from name to template."""
    if isinstance(entry, list) and all(isinstance(item, dict) for item in entry):
        entry = {item.get("name"): item.get("template") for item in entry}
    if isinstance(entry, dict):
        if "default" not in entry:
            names = ", ".join(map(repr, entry)) or "none"
            raise CheckpointError(f"chat_template in {origin} has the templates {names} but no 'default': name one of them 'default'")
        entry = entry["default"]
    if not isinstance(entry, str):
        raise CheckpointError(f"chat_template in {origin} is a {type(entry).__name__}, not text: mend the file, or remove the entry")
    return entry


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({_one_line(error)}): download the model again") from None


class _Refusal(jinja2.TemplateError):
    """Raised by a template that calls raise_exception."""


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's own filter escapes <, > and & for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %} marks the model's own words for training; here its content is simply printed."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

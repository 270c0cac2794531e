"""Where a prompt comes from: a file, standard input, or the command line itself."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import InvalidInput


def read_prompt(prompt: str | None, text: str | None) -> str:
    """The prompt's text.

    Args:
        prompt: value of --prompt: a file's name, or - for standard input.
        text: value of --text: the prompt itself.

    Raises:
        InvalidInput: both or neither given, no such file, a directory, not UTF-8, empty.
    """
    if (prompt is None) == (text is None):
        count = "neither was" if prompt is None else "both were"
        raise InvalidInput(f"{count} given: ask with exactly one of --prompt FILE (or - for standard input) and --text STRING")
    if text is not None:
        return _not_empty(text, "--text is")
    assert prompt is not None
    if prompt == "-":
        if sys.stdin is None:  # Python's way to say that it was closed
            raise InvalidInput("standard input is closed: give a file with --prompt, or the prompt itself with --text")
        return _not_empty(_decoded(sys.stdin.buffer.read(), "standard input"), "standard input is")
    return _not_empty(_decoded(_bytes_of(prompt), f"prompt file {prompt}"), f"prompt file {prompt} is")


def _bytes_of(prompt: str) -> bytes:
    try:
        return Path(prompt).read_bytes()
    except IsADirectoryError:
        raise InvalidInput(f"--prompt {prompt} is a directory: name one text file") from None
    except FileNotFoundError:
        raise InvalidInput(f"--prompt {prompt!r} names no file: to give the prompt itself, use --text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(
            f"--prompt {prompt!r} cannot be read ({reason}): name a readable text file, or give the prompt with --text"
        ) from None


def _decoded(content: bytes, source: str) -> str:
    """The text, without the byte order mark that some editors put before it."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{source} is not UTF-8 (byte {content[error.start]:#04x} at position {error.start}): save the text as UTF-8"
        ) from None


def _not_empty(text: str, subject: str) -> str:
    if not text.strip():
        raise InvalidInput(f"{subject} empty: a prompt needs at least one visible character")
    return text

"""Where texts come from: a user's file, the Python language reference, or sentences made up from a seed."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import re
from pathlib import Path
from random import Random

from ..errors import InvalidInput
from .words import prose_sentences


class Prose:
    """A source of running text: sentences of a given text, or made-up ones that are the same on every machine."""

    def __init__(self, text: str | None = None) -> None:
        self._sentences = None if text is None else [part for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if part.strip()]

    def sentences(self, random: Random, count: int) -> list[str]:
        """`count` sentences in a row, from a random place on; a text that ends goes on from its beginning."""
        if self._sentences is None:
            return prose_sentences(random, count)
        start = random.randrange(len(self._sentences))
        return [self._sentences[(start + n) % len(self._sentences)] for n in range(count)]


def read_text(path: Path) -> str:
    """The text of a file. Raises InvalidInput when it cannot be read, is not UTF-8, or is blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InvalidInput(f"--text {path} cannot be read ({reason}): name a text file in UTF-8") from None
    if not text.strip():
        raise InvalidInput(f"--text {path} is empty: name a file with some text")
    return text


def python_reference() -> str:
    """The Python language reference as this Python's `pydoc` holds it: about 100,000 tokens of technical English."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def digest(text: str) -> str:
    """A short fingerprint of a text, to tell one from another."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

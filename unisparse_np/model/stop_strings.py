"""StopStrings: find the text that ends an answer, however tokens cut it, and never print a part of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import InvalidInput


class StopStrings:
    """Watches a stream of text for the stop string that is complete first.

    Text that may be the beginning of a stop string is held back until it is certain, so the cost of a step depends on the
    stop strings and not on the text so far.

    Args:
        texts: the stop strings; a single string is one of them. None of them: everything passes.

    Raises:
        InvalidInput: a stop string is empty or not a string.
    """

    def __init__(self, texts: str | Sequence[str]) -> None:
        if not isinstance(texts, Iterable):
            raise InvalidInput(f"stop={texts!r} is no text: give one stop string, or several in a list")
        self.texts = (texts,) if isinstance(texts, str) else tuple(texts)
        for text in self.texts:
            if not isinstance(text, str) or not text:
                raise InvalidInput(f"the stop string {text!r} can never be found: give some text, or leave it out")
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was found); what is found and what follows it are dropped."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.texts if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            _, at = min(found)  # first complete; of two that end together, the longer
            return text[:at], True
        held = max((_overlap(text, stop) for stop in self.texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text held back, for when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[len(text) - length :])), 0)

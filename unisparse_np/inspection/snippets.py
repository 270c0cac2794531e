"""The text of a stretch of tokens, short enough for one line and safe for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.tokenizer import Tokenizer


def one_line(tokenizer: Tokenizer, token_ids: Sequence[int], width: int) -> str:
    """Quoted text of at most `width` characters; the middle is left out where it is longer, control characters are dots."""
    text = tokenizer.decode(token_ids, show_special_tokens=True)
    text = "".join(" " if c.isspace() else c if c.isprintable() else "·" for c in text)
    room = width - 2
    if len(text) > room:
        head = (room - 3 + 1) // 2
        text = text[:head] + "..." + text[len(text) - (room - 3 - head) :]
    return f'"{text}"'

"""Detokenizer: token ids in one by one, whole characters out."""

from __future__ import annotations

import tokenizers
from tokenizers.decoders import DecodeStream

# A character has at most 4 bytes, so at most 4 tokens. More tokens than this without any text are not on the way to a
# character (bytes that are no UTF-8, skipped special tokens), and are written off to keep a step's cost constant.
_LONGEST_WAIT = 32
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Decodes one answer incrementally: the pieces, concatenated, are the text that decoding all tokens at once gives.

    Special tokens are left out. A character whose bytes are spread over several tokens comes out with the last of them;
    bytes that never become a character come out as U+FFFD, at `flush` at the latest (how many of these stand for a run of
    stray bytes may differ from decoding at once).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens of the last text that came out: decoders treat the first word apart
        self._waiting: list[int] = []  # tokens since then
        self._restart()

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        self._waiting.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # stray bytes change how the text before them decodes; what is out stays, so start anew behind it
            text = self._text_of(self._waiting)
            self._context, self._waiting = self._waiting, []
            self._restart()
            return text
        if text is not None:
            self._context, self._waiting = self._waiting, []
            return text
        return self._write_off() if len(self._waiting) > _LONGEST_WAIT else ""

    def flush(self) -> str:
        """The text of whatever is unfinished; the detokenizer may be used on after it."""
        text = self._text_of(self._waiting)
        self._context, self._waiting = [], []
        self._restart()
        return text

    def _restart(self) -> None:
        """A stream that has given out the context and nothing after it."""
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)

    def _write_off(self) -> str:
        """Give out all but the last few waiting tokens, where the cut goes through no character."""
        whole = self._text_of(self._waiting)
        for cut in range(len(self._waiting) - _LONGEST_CHARACTER, len(self._waiting)):
            text = self._text_of(self._waiting[:cut])
            if text + self._text_of(self._waiting[cut:]) == whole:
                rest, self._waiting = self._waiting[cut:], []
                self._restart()
                return text + "".join(self.push(token_id) for token_id in rest)
        return ""

    def _text_of(self, token_ids: list[int]) -> str:
        """What `token_ids` add after the context."""
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        whole = self._tokenizer.decode(self._context + token_ids, skip_special_tokens=True)
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(token_ids, skip_special_tokens=True)

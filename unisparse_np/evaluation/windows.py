"""Windows of a text in tokens, in an order that a seed decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from ..errors import InvalidInput
from ..model.tokenizer import Tokenizer


@dataclass
class Windows:
    """Windows of `length` tokens that do not overlap, shuffled: the first few are the same however many are taken.

    Each begins with the BOS token where the model wants one. Without a count, all windows there are but `most` at most.

    Raises:
        InvalidInput: the text is shorter than one window, or holds fewer than `count`.
    """

    tokenizer: Tokenizer
    text: str
    length: int
    seed: int = 0
    count: int | None = None
    most: int = 8
    _windows: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        if self.length < 32:
            raise InvalidInput(f"--length {self.length} is too short for a window of text: give at least 32")
        opening = self.tokenizer.encode("", add_bos=True)
        token_ids = self.tokenizer.encode(self.text, add_bos=False)
        room = self.length - len(opening)
        starts = list(range(0, len(token_ids) - room + 1, room))
        if not starts:
            raise InvalidInput(
                f"the text has {len(token_ids)} tokens, fewer than one window of {self.length}: give a longer text or a smaller --length"
            )
        if self.count is not None and self.count > len(starts):
            raise InvalidInput(
                f"the text of {len(token_ids)} tokens holds {len(starts)} windows of {self.length}, fewer than the {self.count} asked for: "
                "give a longer text, a smaller --length or a smaller count"
            )
        Random(f"{self.seed}/{self.length}").shuffle(starts)
        self._windows = [opening + token_ids[start : start + room] for start in starts[: self.count or self.most]]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> list[int]:
        return self._windows[index]

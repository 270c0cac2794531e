"""RULER questions of a length in tokens: each is made as long as fits, for the tokenizer and chat template at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from ..errors import InvalidInput
from ..model.tokenizer import Tokenizer
from .haystack import Prose
from .questions import Question, encode_question
from .ruler_tasks import TASKS
from .words import NOISE

_PROBE = f"{NOISE} VAR QXZJK = 13579. 1. amber-kettle? 2. 0f8e-46bd: Document 2,\n"


def ruler_question(
    tokenizer: Tokenizer, task: str, length: int, seed: int, index: int, raw: bool = False, prose: Prose | None = None
) -> tuple[Question, list[int]]:
    """Question number `index` of a task, and its token ids. The same arguments give the same question.

    length: prompt tokens and the room for the answer together never exceed it, and fall short by about one
        sentence (or word, or document) or a thousandth at most.

    Raises:
        InvalidInput: the length is too short for the task.
    """
    build, smallest = TASKS[task]
    prose = prose or Prose()

    def make(size: int) -> tuple[Question, list[int]]:
        question = replace(build(Random(f"{seed}/{task}/{length}/{index}"), size, prose), task=task)
        return question, encode_question(tokenizer, question, raw)

    def tokens(made: tuple[Question, list[int]]) -> int:
        return len(made[1]) + made[0].max_tokens

    fitted = _largest_that_fits(make, tokens, smallest, length)
    if fitted is None:
        raise InvalidInput(f"--length {length} is too short for {task}, which takes {tokens(make(smallest))} tokens at least: give more")
    return fitted


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise InvalidInput for a tokenizer that cannot spell the tasks: answers would get lost on the way in."""
    back = tokenizer.decode(tokenizer.encode(_PROBE, add_bos=False))
    if "".join(back.split()) != "".join(_PROBE.split()):
        raise InvalidInput(
            f"this model's tokenizer cannot spell the RULER tasks ({_PROBE[-40:].strip()!r} comes back as {back[-40:].strip()!r}): "
            "ask questions made for it with --suite questions"
        )


def _largest_that_fits(
    make: Callable[[int], tuple[Question, list[int]]], tokens: Callable[[tuple[Question, list[int]]], int], smallest: int, budget: int
) -> tuple[Question, list[int]] | None:
    """The largest size whose tokens fit the budget, to within one unit or a thousandth; by interpolation, as tokens grow about linearly."""
    low, best = smallest, make(smallest)
    low_tokens = tokens(best)
    if low_tokens > budget:
        return None
    high: int | None = None
    guess = 2 * low + 8
    while True:
        made = make(guess)
        count = tokens(made)
        per_unit = max(1.0, (count - low_tokens) / (guess - low))  # the slope from the last size that fitted
        if count <= budget:
            low, low_tokens, best = guess, count, made
        else:
            high = guess
        if budget - low_tokens < max(per_unit, budget / 1000) or (high is not None and high - low < 2):
            return best
        guess = low + max(1, int((budget - low_tokens) / per_unit))
        if high is not None:
            guess = min(guess, high - 1)

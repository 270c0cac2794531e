"""Suites of questions: RULER's tasks from a seed, or a file's.

The prompt is read with the attention that is measured; the answer is written greedily with dense decode.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidInput
from ..model.generate import stream_generate
from ..model.llama import Attention, Llama
from ..model.tokenizer import Tokenizer
from .haystack import Prose, digest
from .questions import Question, encode_question, read_questions, string_match
from .ruler import check_tokenizer, ruler_question
from .ruler_tasks import TASKS
from .suite import Attentions, Example, Step, require_context


@dataclass
class RulerSuite:
    """`count` questions of each task at each length. text: background for the tasks that hide needles in prose; None: made up."""

    tokenizer: Tokenizer
    lengths: Sequence[int]
    count: int
    seed: int = 0
    tasks: Sequence[str] = tuple(TASKS)
    raw: bool = False
    text: str | None = None
    name: str = "ruler"
    _prose: Prose = field(init=False)

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise InvalidInput(f"--tasks {unknown[0]!r} is no RULER task: give some of {', '.join(TASKS)}")
        check_tokenizer(self.tokenizer)
        self._prose = Prose(self.text)

    def check(self, model: Llama) -> None:
        """Raise InvalidInput when a length does not fit the model or a task."""
        for length in self.lengths:
            require_context(model, length)
        for task in self.tasks:
            self.question(Example(min(self.lengths), task, 0))

    def identity(self) -> dict[str, Any]:
        return {
            "lengths": sorted(self.lengths), "seed": self.seed, "tasks": sorted(self.tasks), "raw": self.raw,
            "text": None if self.text is None else digest(self.text),
        }  # fmt: skip

    def examples(self) -> list[Example]:
        """Task by task in turn, so that a run that is stopped has some of each."""
        return [Example(length, task, index) for length in self.lengths for index in range(self.count) for task in self.tasks]

    def question(self, example: Example) -> tuple[Question, list[int]]:
        return ruler_question(self.tokenizer, example.task, example.length, self.seed, example.number, self.raw, self._prose)

    def measure(self, example: Example, model: Llama, tokenizer: Tokenizer, attentions: Attentions, step: Step) -> dict[str, dict]:
        return _ask_all(*self.question(example), model, tokenizer, attentions, step)


@dataclass
class QuestionFileSuite:
    """The questions of a file of JSON lines; `count` takes the first so many of each task."""

    tokenizer: Tokenizer
    path: Path
    count: int | None = None
    raw: bool = False
    name: str = "questions"
    _questions: dict[Example, Question] = field(init=False)

    def __post_init__(self) -> None:
        numbers: dict[str, int] = {}
        self._questions = {}
        for question in read_questions(self.path):
            index = numbers[question.task] = numbers.get(question.task, -1) + 1
            if self.count is None or index < self.count:
                self._questions[Example(0, question.task, index)] = question

    def check(self, model: Llama) -> None:
        """Raise InvalidInput when a prompt with its answer does not fit the model."""
        for example, question in self._questions.items():
            tokens = len(encode_question(self.tokenizer, question, self.raw)) + question.max_tokens
            if tokens > model.max_context:
                raise InvalidInput(
                    f"{self.path}: question {example.number + 1} of {example.task} takes {tokens} tokens with its answer, more than the "
                    f"{model.max_context} this model may use: shorten it, or raise the limit with --max-context"
                )

    def identity(self) -> dict[str, Any]:
        return {"questions": digest(self.path.read_text(encoding="utf-8")), "raw": self.raw}

    def examples(self) -> list[Example]:
        return list(self._questions)

    def measure(self, example: Example, model: Llama, tokenizer: Tokenizer, attentions: Attentions, step: Step) -> dict[str, dict]:
        question = self._questions[example]
        return _ask_all(question, encode_question(tokenizer, question, self.raw), model, tokenizer, attentions, step)


def _ask_all(
    question: Question, token_ids: list[int], model: Llama, tokenizer: Tokenizer, attentions: Attentions, step: Step
) -> dict[str, dict]:
    measured = {}
    for label, attention in attentions.items():
        measured[label] = ask(question, token_ids, model, tokenizer, attention)
        step()
    return measured


def ask(question: Question, token_ids: list[int], model: Llama, tokenizer: Tokenizer, attention: Attention) -> dict[str, Any]:
    """Put one question -> score (0 to 1), answer, density of the prefill, its seconds, prompt tokens.

    The answer ends when nothing can change its score: at the model's end, at max_tokens, or once every answer is found.
    """
    density = 1.0

    def watch(done: int, total: int, density_so_far: float) -> None:
        nonlocal density
        density = density_so_far

    text, seconds, started = "", 0.0, time.perf_counter()
    for piece in stream_generate(model, tokenizer, token_ids, attention=attention, max_tokens=question.max_tokens, progress=watch):
        seconds = seconds or time.perf_counter() - started
        text += piece.text
        if string_match(text, question.answers, question.match) == 1.0:
            break
    score = string_match(text, question.answers, question.match)
    return {"score": score, "answer": text, "density": density, "prefill_seconds": round(seconds, 4), "prompt_tokens": len(token_ids)}

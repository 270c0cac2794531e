"""Questions with answers that are looked for in what the model writes, and files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidInput
from ..model.tokenizer import Tokenizer

Match = Literal["all", "part"]


@dataclass(frozen=True)
class Question:
    """A prompt and what its answer must hold.

    answer_prefix: words put into the model's mouth after the prompt, so that it begins with the answer itself; may be empty.
    answers, match: all of them count in equal shares ("all"), or any one is enough ("part").
    max_tokens: most tokens of the answer.
    """

    prompt: str
    answers: tuple[str, ...]
    match: Match
    max_tokens: int
    answer_prefix: str = ""
    task: str = "questions"


def encode_question(tokenizer: Tokenizer, question: Question, raw: bool) -> list[int]:
    """Token ids that the model continues: through the chat template and then the answer prefix, or all of it as plain text."""
    if raw or not tokenizer.has_chat_template:
        return tokenizer.encode_prompt(f"{question.prompt} {question.answer_prefix}".rstrip(), raw=True)
    prefix = tokenizer.encode(question.answer_prefix, add_bos=False) if question.answer_prefix else []
    return tokenizer.encode_prompt(question.prompt) + prefix


def string_match(text: str, answers: Sequence[str], match: Match) -> float:
    """RULER's score of one answer, 0 to 1 (arXiv 2404.06654): share of the answers that occur in the text, whatever their case."""
    found = [answer.lower() in text.lower() for answer in answers]
    return float(any(found)) if match == "part" else sum(found) / len(found)


def read_questions(path: Path) -> list[Question]:
    """One JSON object a line: prompt, answers, and if given match ("all"), max_tokens (128), answer_prefix and task.

    Raises:
        InvalidInput: no such file, or a line that is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InvalidInput(f"--questions {path} cannot be read ({reason}): name a file with one JSON object a line") from None
    questions = [_question(json_line, f"{path} line {number}") for number, json_line in enumerate(lines, start=1) if json_line.strip()]
    if not questions:
        raise InvalidInput(f"--questions {path} holds no question: give one JSON object a line, with prompt and answers")
    return questions


def _question(json_line: str, place: str) -> Question:
    try:
        values = json.loads(json_line)
    except ValueError as error:
        raise InvalidInput(f"{place} is not JSON ({error}): give one object a line, with prompt and answers") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"{place} is a {type(values).__name__}: give one object a line, with prompt and answers")
    rules: dict[str, tuple[bool, str]] = {
        "prompt": (_is_text(values.get("prompt")), "a text"),
        "answers": (_is_texts(values.get("answers")), "a list of at least one text"),
        "match": (values.get("match", "all") in ("all", "part"), '"all" or "part"'),
        "max_tokens": (_is_count(values.get("max_tokens", 128)), "a whole number of at least 1"),
        "answer_prefix": (isinstance(values.get("answer_prefix", ""), str), "a text"),
        "task": (_is_text(values.get("task", "questions")), "a text"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise InvalidInput(f"{place}: {name} is {str(values.get(name))[:40]!r}, but must be {rule}")
    if unknown := sorted(set(values) - set(rules)):
        raise InvalidInput(f"{place} has an unknown field {unknown[0]!r}: give {', '.join(rules)}")
    return Question(
        prompt=values["prompt"],
        answers=tuple(values["answers"]),
        match=values.get("match", "all"),
        max_tokens=values.get("max_tokens", 128),
        answer_prefix=values.get("answer_prefix", ""),
        task=values.get("task", "questions"),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

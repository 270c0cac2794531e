"""Files of questions, and RULER's score."""

from pathlib import Path

import pytest

from unisparse_np import InvalidInput
from unisparse_np.evaluation.question_suite import QuestionFileSuite
from unisparse_np.evaluation.questions import Question, read_questions, string_match

from .small_model import small_model


@pytest.mark.parametrize(
    ("text", "answers", "match", "score"),
    [
        ("It is 12 and 34.", ["12", "34"], "all", 1.0),
        ("It is 12.", ["12", "34"], "all", 0.5),
        ("It is 12.", ["12", "34"], "part", 1.0),
        ("in PARIS", ["Paris"], "all", 1.0),
        ("nothing", ["12", "34"], "part", 0.0),
    ],
)
def test_string_match(text: str, answers: list[str], match: str, score: float) -> None:
    assert string_match(text, answers, match) == score  # type: ignore[arg-type]


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"prompt": "a", "answers": ["b"]}\n\n{"prompt": "c", "answers": ["d", "e"], "match": "part", "max_tokens": 3, "task": "t"}'
    )
    assert read_questions(path) == [Question("a", ("b",), "all", 128), Question("c", ("d", "e"), "part", 3, task="t")]


def test_count_takes_the_first_of_each_task(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(f'{{"prompt": "p{n}", "answers": ["b"], "task": "{"xy"[n % 2]}"}}\n' for n in range(6)))
    suite = QuestionFileSuite(small_model()[1], path, count=2)
    assert [(example.task, example.number) for example in suite.examples()] == [("x", 0), ("y", 0), ("x", 1), ("y", 1)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no question"),
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is a list"),
        ('{"answers": ["b"]}', "prompt is 'None'"),
        ('{"prompt": "a", "answers": []}', "answers is '[]'"),
        ('{"prompt": "a", "answers": ["b"], "match": "any"}', "match is 'any'"),
        ('{"prompt": "a", "answers": ["b"], "max_tokens": 0}', "max_tokens is '0'"),
        ('{"prompt": "a", "answers": ["b"], "answer": 1}', "unknown field 'answer'"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidInput) as error:
        read_questions(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_question_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt": "{"abcd " * 200}", "answers": ["b"]}}')
    model, tokenizer = small_model()
    with pytest.raises(InvalidInput, match=r"question 1 of questions takes [0-9]+ tokens .* 512 this model may use"):
        QuestionFileSuite(tokenizer, path).check(model)

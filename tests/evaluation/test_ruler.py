"""RULER questions: as long as asked, the same from the same seed, and right: each is solved from its own text."""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from unisparse_np import InvalidInput
from unisparse_np.evaluation.haystack import Prose, digest
from unisparse_np.evaluation.questions import Question, encode_question
from unisparse_np.evaluation.ruler import check_tokenizer, ruler_question
from unisparse_np.evaluation.ruler_tasks import TASKS
from unisparse_np.evaluation.words import noun_phrases, person_names, single_words
from unisparse_np.model.tokenizer import Tokenizer

from ..model.small_tokenizer import write_folder
from .small_model import small_model

NEEDLE_LLAMA = Path(__file__).parents[2] / "examples" / "needle-llama"
LONGEST_UNIT = 130  # tokens of a document or of a needle with two UUIDs, the largest steps in which a question grows


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NEEDLE_LLAMA)


def ask(task: str, length: int = 2048, seed: int = 1, index: int = 0) -> Question:
    return ruler_question(tokenizer(), task, length, seed, index)[0]


def test_there_are_the_thirteen_tasks() -> None:
    assert len(TASKS) == 13


@pytest.mark.parametrize("length", [1024, 4096, 16384])
@pytest.mark.parametrize("task", TASKS)
def test_the_length_is_never_exceeded_and_nearly_reached(task: str, length: int) -> None:
    for index in range(2):
        question, token_ids = ruler_question(tokenizer(), task, length, 5, index)
        assert token_ids == encode_question(tokenizer(), question, raw=False)
        tokens = len(token_ids) + question.max_tokens
        assert length - max(LONGEST_UNIT, length // 200) <= tokens <= length


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_and_a_number_decide_the_question(task: str) -> None:
    assert ask(task) == ask(task)
    assert len({ask(task, seed=seed, index=index).prompt for seed in (1, 2) for index in (0, 1)}) == 4


def test_the_questions_are_the_same_everywhere() -> None:
    """Results files can be compared between machines and Python versions; a change of the tasks must change this on purpose."""
    assert digest("".join(ask(task).prompt for task in TASKS)) == "1c0ea6fd181c1d67"


@pytest.mark.parametrize("task", TASKS)
def test_a_length_too_short_is_refused(task: str) -> None:
    with pytest.raises(InvalidInput, match=f"--length 100 is too short for {task}, which takes [0-9]+ tokens at least"):
        ask(task, length=100)


NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.")


@pytest.mark.parametrize(
    ("task", "needles", "keys_asked", "answers"),
    [
        ("niah_single_1", 1, 1, 1), ("niah_single_2", 1, 1, 1), ("niah_single_3", 1, 1, 1), ("niah_multikey_1", 4, 1, 1),
        ("niah_multikey_2", None, 1, 1), ("niah_multikey_3", None, 1, 1), ("niah_multivalue", 4, 1, 4), ("niah_multiquery", 4, 4, 4),
    ],
)  # fmt: skip
def test_needles(task: str, needles: int | None, keys_asked: int, answers: int) -> None:
    question = ask(task)
    context, _, query = question.prompt.rpartition("\n")
    found = NEEDLE.findall(context)
    assert len(found) == needles if needles is not None else len(found) > 10
    asked = {key for key, _ in found if key in query}
    assert len(asked) == keys_asked and len(question.answers) == answers
    assert set(question.answers) == {value for key, value in found if key in asked}
    assert all(key in question.answer_prefix for key in asked) and question.match == "all"


def test_needles_lie_at_every_depth() -> None:
    depths = []
    for index in range(40):
        question = ask("niah_single_1", 1024, index=index)
        depths.append(question.prompt.index(question.answers[0]) / len(question.prompt))
    assert min(depths) < 0.25 and max(depths) > 0.75 and 0.35 < sum(depths) / len(depths) < 0.65


def test_variables_are_all_reached_from_the_value() -> None:
    question = ask("vt")
    asked = question.prompt.rpartition("Follow the variable assignments")[2]
    assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", asked))
    value = re.findall(r"assigned the value (\d+)", asked)[0]
    reached = {value}
    for name, source in assigned.items():  # they stand in order
        reached |= {name} if source in reached else set()
    assert reached - {value} == set(question.answers) and len(question.answers) == 5


def test_common_words_are_the_most_common() -> None:
    for length in (1024, 8192):
        question = ask("cwe", length)
        listed = question.prompt.rpartition("Below is a numbered list")[2]
        counts = Counter(word for _, word in re.findall(r"(\d+)\. (\w+)", listed))
        common = counts.most_common(11)
        assert {word for word, _ in common[:10]} == set(question.answers) and common[9][1] > common[10][1]
    assert common[9][1] == 30 and common[10][1] == 3  # RULER's own counts where they fit


def test_frequent_words_are_the_most_frequent() -> None:
    question = ask("fwe")
    counts = Counter(question.prompt.splitlines()[1].split())
    ranked = [word for word, _ in counts.most_common(5)]
    assert ranked[0] == "..." and tuple(ranked[1:4]) == question.answers and counts[ranked[3]] > counts[ranked[4]]


def test_a_document_answers() -> None:
    for index in range(6):
        question = ask("qa_1", index=index)
        context, _, query = question.prompt.rpartition("Question: ")
        if born := re.search(r"In which city was (.+) born", query):
            assert f"{born[1]} was born in {question.answers[0]}." in context
        else:
            name = re.search(r"What does (.+) work as", query)
            assert name and re.search(rf"By trade {re.escape(name[1])} is an? {question.answers[0]}\.", context)


def test_two_documents_answer_together() -> None:
    question = ask("qa_2")
    context, _, query = question.prompt.rpartition("Question: ")
    thing = re.search(r"owner of the (.+) born", query)
    assert thing
    owner = re.search(rf"The {thing[1]} belongs to (.+?)\. ", context)
    assert owner and f"{owner[1]} was born in {question.answers[0]}." in context and question.match == "part"


def test_a_text_of_ones_own_is_the_background() -> None:
    prose = Prose("First sentence here. Second one there! " * 5)
    question, _ = ruler_question(tokenizer(), "niah_single_2", 1024, 1, 0, prose=prose)
    assert question.prompt.count("Second one there!") > 5 and "stood near" not in question.prompt


def test_chat_template_and_raw() -> None:
    _, chat_tokenizer = small_model()
    question = Question("What is it?", ("x",), "all", 8, "It is")
    template_first = chat_tokenizer.encode_prompt("What is it?") + chat_tokenizer.encode("It is", add_bos=False)
    assert encode_question(chat_tokenizer, question, raw=False) == template_first
    assert encode_question(chat_tokenizer, question, raw=True) == chat_tokenizer.encode("What is it? It is")


def test_a_tokenizer_that_loses_characters_is_refused(tmp_path: Path) -> None:
    check_tokenizer(tokenizer())
    write_folder(tmp_path / "lossy", tokenizer=_digits_only())
    with pytest.raises(InvalidInput, match="cannot spell the RULER tasks"):
        check_tokenizer(Tokenizer.from_folder(tmp_path / "lossy"))


def _digits_only():
    import tokenizers

    vocab = {name: n for n, name in enumerate(["<|begin|>", "<|end|>", "?", *"0123456789"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="?"))
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    return made


def test_drawn_words_differ() -> None:
    from random import Random

    for draw, count in ((noun_phrases, 3000), (single_words, 3000), (person_names, 6000)):
        assert len(set(draw(Random(1), count))) == count

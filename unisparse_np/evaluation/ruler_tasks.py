"""The 13 tasks of RULER (arXiv 2404.06654, tables 2 and 5, appendix B), worded anew; one function a kind of task.

Each function makes a Question from a random generator and a size: sentences, words or documents. SQuAD and HotpotQA, from which
RULER takes the two QA tasks, are replaced by made-up documents about made-up people, and Paul Graham's essays by made-up prose
or a text of the user's.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from random import Random
from typing import NamedTuple

from .haystack import Prose
from .questions import Question
from .words import JOBS, NOISE, PLACES, noun_phrases, numbers, person_names, single_words, uuid, with_articles

Build = Callable[[Random, int, Prose], Question]
ZETA_2 = math.pi**2 / 6


class RulerTask(NamedTuple):
    """build(random, size, prose) makes the question; `smallest` is the least size that makes sense."""

    build: Build
    smallest: int


def needles(
    random: Random,
    size: int,
    prose: Prose,
    *,
    haystack: str = "prose",
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Question:
    """Needle in a haystack: key-value sentences hidden among `size` sentences of noise, prose or more such needles."""
    kind = "number" if values == "numbers" else "uuid"
    count = max(size, num_keys) if haystack == "needles" else num_keys
    names = noun_phrases(random, count) if keys == "words" else [uuid(random) for _ in range(count)]
    drawn = numbers(random, 7, count * num_values) if values == "numbers" else [uuid(random) for _ in range(count * num_values)]
    of_key = {name: drawn[n * num_values : (n + 1) * num_values] for n, name in enumerate(names)}
    asked = random.sample(names, num_queries)
    hidden = [f"One of the special magic {kind}s for {name} is: {value}." for name in names for value in of_key[name]]
    random.shuffle(hidden)
    context = "\n".join(hidden) if haystack == "needles" else _hide(random, hidden, _background(random, size, prose, haystack))
    answers = tuple(value for name in asked for value in of_key[name])
    subject = f"{_listed(asked)} mentioned in the text above"
    several = len(answers) > 1
    question = f"What are all the special magic {kind}s for {subject}?" if several else f"What is the special magic {kind} for {subject}?"
    prefix = f"The special magic {kind}{'s' if several else ''} for {subject} {'are' if several else 'is'}"
    opening = f"Some special magic {kind}s are hidden in the following text. Remember them: I will ask about them afterwards."
    return Question(f"{opening}\n{context}\n{question}", answers, "all", 128, prefix)


def variable_tracking(random: Random, size: int, prose: Prose) -> Question:
    """Follow a value through a chain of four assignments hidden in noise; a solved short example comes first."""
    solved, names, value = _chain(random, 5)
    asked, answers, asked_value = _chain(random, size)

    def question(value: str) -> str:
        return f"Question: Which variables are assigned the value {value} in the text above, directly or through another variable?"

    def prefix(value: str) -> str:
        return f"Answer: By the assignments in the text above, 5 variables are assigned the value {value}, they are:"

    opening = "Follow the variable assignments hidden in the following text."
    example = f"{opening}\n\n{solved}\n{question(value)} {prefix(value)} {' '.join(names)}\n\n"
    return Question(f"{example}{opening}\n\n{asked}\n{question(asked_value)}", tuple(answers), "all", 30, prefix(asked_value))


def common_words(random: Random, size: int, prose: Prose) -> Question:
    """Ten words that occur ten times as often as all others, in a numbered list of `size`; a solved short example comes first."""
    solved, common = _numbered_list(random, 40)
    asked, answers = _numbered_list(random, size)
    opening = "Below is a numbered list of words. Some of them occur more often than the others. Remember the ones that occur most often."
    question = "Question: What are the 10 most common words in the list above?"
    prefix = "Answer: The 10 words that occur most often in the list are:"
    example = f"{opening}\n{solved}\n{question} {prefix} {' '.join(f'{n}. {word}' for n, word in enumerate(common, start=1))}\n\n"
    return Question(f"{example}{opening}\n{asked}\n{question}", tuple(answers), "all", 120, prefix)


def frequent_words(random: Random, size: int, prose: Prose) -> Question:
    """Coded words whose counts fall with the square of their rank (zeta distribution, alpha 2); dots hold the first rank."""
    counts = [int(size / ZETA_2 / rank**2) for rank in range(1, size)]
    counts = counts[: max(5, sum(count > 0 for count in counts))]
    words: list[str] = []
    while len(words) < len(counts) - 1:
        word = "".join(random.choice("bdfgklmnprst") + random.choice("aeiou") for _ in range(3))
        words += [word] if word not in words else []
    text = [word for word, count in zip(["...", *words], counts, strict=True) for _ in range(count)]
    random.shuffle(text)
    opening = "Read the following coded text and keep track of how often each coded word occurs. The dots are no word."
    question = "Question: What are the three most frequent words in the coded text above?"
    prefix = "Answer: By the coded text above, the three most frequent words are:"
    return Question(f"{opening}\n{' '.join(text)}\n{question}", tuple(words[:3]), "all", 50, prefix)


def one_document(random: Random, size: int, prose: Prose) -> Question:
    """A question that one of `size` documents answers."""
    people = _people(random, size)
    asked = people[random.randrange(size)]
    query, answer = random.choice(((f"In which city was {asked.name} born?", asked.place), (f"What does {asked.name} work as?", asked.job)))
    return _about_documents(random, [_about_person(random, person, prose) for person in people], query, answer)


def two_documents(random: Random, size: int, prose: Prose) -> Question:
    """A question whose answer takes two of `size` documents: who owns a thing, and where that person was born."""
    people = _people(random, (size + 1) // 2)
    things = [phrase.replace("-", " ") for phrase in noun_phrases(random, size // 2)]
    asked = random.randrange(len(things))
    owned = [
        f"The {thing} belongs to {person.name}. {_filler(random, prose)}"
        for thing, person in zip(things, people[: len(things)], strict=True)
    ]
    documents = owned + [_about_person(random, person, prose) for person in people]
    query = f"In which city was the owner of the {things[asked]} born?"
    return _about_documents(random, documents, query, people[asked].place)


TASKS: dict[str, RulerTask] = {
    "niah_single_1": RulerTask(partial(needles, haystack="noise"), 1),
    "niah_single_2": RulerTask(needles, 1),
    "niah_single_3": RulerTask(partial(needles, values="uuids"), 1),
    "niah_multikey_1": RulerTask(partial(needles, num_keys=4), 1),
    "niah_multikey_2": RulerTask(partial(needles, haystack="needles"), 2),
    "niah_multikey_3": RulerTask(partial(needles, haystack="needles", keys="uuids", values="uuids"), 2),
    "niah_multivalue": RulerTask(partial(needles, num_values=4), 1),
    "niah_multiquery": RulerTask(partial(needles, num_keys=4, num_queries=4), 1),
    "vt": RulerTask(variable_tracking, 5),
    "cwe": RulerTask(common_words, 40),
    "fwe": RulerTask(frequent_words, 120),
    "qa_1": RulerTask(one_document, 2),
    "qa_2": RulerTask(two_documents, 4),
}


# ---- parts of the tasks ----


def _background(random: Random, size: int, prose: Prose, kind: str) -> list[str]:
    """`size` sentences, drawn from a generator of their own so that a longer background begins like a shorter one."""
    own = Random(random.getrandbits(64))
    return [NOISE] * size if kind == "noise" else prose.sentences(own, size)


def _hide(random: Random, hidden: list[str], background: list[str], in_order: bool = False) -> str:
    """Sentences hidden at random depths of the background."""
    depths = [random.random() for _ in hidden]
    places = [
        (int(depth * (len(background) + 1)), text) for depth, text in zip(sorted(depths) if in_order else depths, hidden, strict=True)
    ]
    sentences = list(background)
    for place, text in reversed(sorted(places, key=lambda pair: pair[0])):
        sentences.insert(place, text)
    return ("\n" if background and background[0] == NOISE else " ").join(sentences)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _chain(random: Random, size: int) -> tuple[str, list[str], str]:
    """Five variables in noise, the first with a value and each other with the one before -> text, names, value."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(random.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = numbers(random, 5, 1)[0]
    steps = [f"VAR {names[0]} = {value}."] + [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
    return _hide(random, steps, [NOISE] * size, in_order=True), names, value


def _numbered_list(random: Random, size: int) -> tuple[str, list[str]]:
    """`size` entries, of which ten common words fill at most half -> text, common words (30 times each, others 3 times, where they fit)."""
    often = min(30, max(2, size // 20))
    seldom = max(1, often // 10)
    others = math.ceil((size - 10 * often) / seldom)
    words = single_words(Random(random.getrandbits(64)), 10 + others)
    entries = words[:10] * often + (words[10:] * seldom)[: size - 10 * often]
    random.shuffle(entries)
    return " ".join(f"{n}. {word}" for n, word in enumerate(entries, start=1)), words[:10]


class _Person(NamedTuple):
    name: str
    place: str
    job: str


def _people(random: Random, count: int) -> list[_Person]:
    return [_Person(name, random.choice(PLACES), random.choice(JOBS)) for name in person_names(random, count)]


def _filler(random: Random, prose: Prose) -> str:
    return " ".join(prose.sentences(random, 2))


def _about_person(random: Random, person: _Person, prose: Prose) -> str:
    facts = [f"{person.name} was born in {person.place}.", with_articles(f"By trade {person.name} is a {person.job}.")]
    random.shuffle(facts)
    return f"{' '.join(facts)} {_filler(random, prose)}"


def _about_documents(random: Random, documents: list[str], query: str, answer: str) -> Question:
    random.shuffle(documents)
    context = "\n\n".join(f"Document {n}:\n{document}" for n, document in enumerate(documents, start=1))
    rule = "Answer the question from the documents. Give only the answer and no other words."
    return Question(f"{rule}\n\nThese are the documents.\n\n{context}\n\n{rule}\n\nQuestion: {query}", (answer,), "part", 32, "Answer:")

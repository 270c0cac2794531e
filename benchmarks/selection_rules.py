"""What does each rule of block selection cost a model? Many rules on the same windows of text and the same needle questions.

    make smollm2
    python benchmarks/selection_rules.py text --length 4096 --windows 2
    python benchmarks/selection_rules.py needles --length 4096 --questions 56
    python benchmarks/selection_rules.py text --length 8192 --windows 4 --backend cupy

text: SmolLM2 on English prose (the Python language reference) and code (the standard library), every layer sparse; per token
of each window's second half: KL(dense || sparse) in nats, top-1 agreement, rise of the negative log-likelihood. needles:
needle-llama on its own tasks, share of dense accuracy kept. Density counts anchors; selection is the share of dense attention's
products. What is measured goes to benchmarks/results/selection_rules_KIND_LENGTH.jsonl at once, so that a run that was stopped goes
on; the means, with 95% intervals, go to the .json beside it, and docs/make_selection_rules_page.py makes docs/selection_rules.md of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from common import NEEDLE_LLAMA, RESULTS, SMOLLM2, stamp, write_result
from losses import Row, Window, answer, questions, text_windows

from unisparse_np import UniSparseConfig
from unisparse_np.evaluation.cost import selection_share
from unisparse_np.evaluation.intervals import mean_estimate, ratio_estimate
from unisparse_np.model.loading import load


def config(top_p: float | None = None, tau: float | None = None, **more: int) -> UniSparseConfig:
    """A rule with sink, local block and one anchor unless said otherwise."""
    return UniSparseConfig(top_p=top_p, row_threshold=tau, **more)


PLAIN = {"key_anchors": 0}
S64 = {"block_size": 64}
RULES: dict[str, UniSparseConfig] = {
    "paper, bare, P .95": UniSparseConfig.paper(),
    "+ sink block": config(0.95, key_anchors=0, local_blocks=0),
    "+ local block": config(0.95, **PLAIN),
    "+ 1 anchor a block: default": UniSparseConfig(),
    "2 anchors": config(0.95, key_anchors=2),
    "anchors, no sink, no local": config(0.95, sink_blocks=0, local_blocks=0),
    "no anchors, P .98": config(0.98, **PLAIN),
    "no anchors, P .99": config(0.99, **PLAIN),
    "P .98": config(0.98),
    "P .90": config(0.90),
    "P .80": config(0.80),
    "c 4": config(0.95, q_compress=4, k_compress=4),
    "c 16": config(0.95, q_compress=16, k_compress=16),
    "c 32": config(0.95, q_compress=32, k_compress=32),
    "tau .02": config(tau=0.02),
    "c 4, tau .02": config(tau=0.02, q_compress=4, k_compress=4),
    "S 64": config(0.95, **S64),
    "S 64, c 4, P .98": config(0.98, q_compress=4, k_compress=4, **S64),
    "S 64, c 4, tau .01": config(tau=0.01, q_compress=4, k_compress=4, **S64),
    "S 64, c 4, tau .02": config(tau=0.02, q_compress=4, k_compress=4, **S64),
    "S 64, c 4, P .95 or tau .02": config(0.95, 0.02, q_compress=4, k_compress=4, **S64),
    "S 64, c_q 4, c_k 2, tau .02": config(tau=0.02, q_compress=4, k_compress=2, **S64),
    "S 64, c_q 4, c_k 2, tau .01": config(tau=0.01, q_compress=4, k_compress=2, **S64),
    "S 64, c_q 8, c_k 2, P .95": config(0.95, q_compress=8, k_compress=2, **S64),
    "S 64, c_q 2, c_k 4, tau .01": config(tau=0.01, q_compress=2, k_compress=4, **S64),
    "S 64, c_q 2, c_k 4, tau .02": config(tau=0.02, q_compress=2, k_compress=4, **S64),
    "S 64, c_q 2, c_k 4, tau .03": config(tau=0.03, q_compress=2, k_compress=4, **S64),
    "S 64, c_q 2, c_k 8, tau .02": config(tau=0.02, q_compress=2, k_compress=8, **S64),
    "S 64, c_q 2, c_k 8, tau .01": config(tau=0.01, q_compress=2, k_compress=8, **S64),
    "S 64, c_q 1, c_k 8, tau .03": config(tau=0.03, q_compress=1, k_compress=8, **S64),
    "S 64, c_q 1, c_k 8, tau .025": config(tau=0.025, q_compress=1, k_compress=8, **S64),
    "S 64, c_q 1, c_k 16, tau .02": config(tau=0.02, q_compress=1, k_compress=16, **S64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("text", "needles"))
    parser.add_argument("--length", type=int, default=4096, help="tokens; for text a multiple of 1,024")
    parser.add_argument("--windows", type=int, default=2, help="of each of the two kinds of text")
    parser.add_argument("--questions", type=int, default=56, help="spread over the 14 tasks")
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="default: all")
    options = parser.parse_args()
    if options.kind == "text" and options.length % 1024:
        parser.error(f"--length {options.length} is no multiple of 1,024, so the halves of a window would not be whole blocks")
    name = f"selection_rules_{options.kind}_{options.length}"
    records = RESULTS / f"{name}.jsonl"
    known = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    done = {(record["item"], record["rule"]) for record in known}
    measure = text_records if options.kind == "text" else needle_records
    where = stamp(*(() if options.backend == "reference" else ("cupy-cuda13x",)))
    for record in measure(options, done):
        known.append(record)
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        write_result(name, summary(options, known, where))  # of what is there, so that a run that is cut short leaves its means
        print(*(f"{key} {value:.4f}" if isinstance(value, float) else value for key, value in record.items()), flush=True)
    print(write_result(name, summary(options, known, where)))


def text_records(options: argparse.Namespace, done: set[tuple[str, str]]) -> Iterator[Row]:
    """Each window under dense attention once, then under every rule that is not measured yet."""
    model, tokenizer = load(str(SMOLLM2), backend=options.backend)
    for kind, start, token_ids in text_windows(tokenizer, options.length, options.windows):
        item = f"{kind} {start}"
        missing = [rule for rule in options.rules if (item, rule) not in done]
        if missing:
            window = Window(model, token_ids)
            for rule in missing:
                yield {"item": item, "rule": rule, **window.loss(RULES[rule])}


def needle_records(options: argparse.Namespace, done: set[tuple[str, str]]) -> Iterator[Row]:
    """Each question under dense attention and under every rule that is not measured yet."""
    model, tokenizer = load(str(NEEDLE_LLAMA), backend=options.backend)
    for number, (task, example) in enumerate(questions(options.length, options.questions)):
        item = f"{task} {number}"
        for rule in ["dense", *options.rules]:
            if (item, rule) not in done:
                yield {"item": item, "rule": rule, **answer(model, tokenizer, example, RULES.get(rule, "dense"))}


def summary(options: argparse.Namespace, records: list[Row], where: dict[str, Any]) -> dict[str, Any]:
    """A row a rule: means over windows, or the share of dense accuracy kept, with 95% intervals."""
    by_rule: dict[str, list[Row]] = {}
    for record in records:
        by_rule.setdefault(record["rule"], []).append(record)
    dense = {record["item"]: record["score"] for record in by_rule.pop("dense", [])}
    row_of = text_row if options.kind == "text" else partial(needle_row, dense)
    rows = [
        {"rule": rule, "config": asdict(config), "selection": selection_share(config), "items": len(by_rule[rule]), **row_of(by_rule[rule])}
        for rule, config in RULES.items()
        if rule in by_rule
    ]
    return {"stamp": where, "kind": options.kind, "length": options.length, "backend": options.backend, "rows": rows}


def text_row(found: list[Row]) -> Row:
    means = {key: mean_estimate([record[key] for record in found]).value for key in ("kl", "top1", "nll_rise", "density")}
    return means | {"kl_interval": mean_estimate([record["kl"] for record in found], lowest=0.0)[1:]}


def needle_row(dense: dict[str, float], found: list[Row]) -> Row:
    """dense: item -> score; found: the same questions under one rule."""
    share = ratio_estimate([record["score"] for record in found], [dense[record["item"]] for record in found])
    return {
        "score": mean_estimate([record["score"] for record in found]).value,
        "density": mean_estimate([record["density"] for record in found]).value,
        "share_of_dense": share.value,
        "share_interval": share[1:],
        "worse_than_dense": sum(record["score"] < dense[record["item"]] for record in found),
    }


if __name__ == "__main__":
    main()

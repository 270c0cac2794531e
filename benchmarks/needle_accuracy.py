"""Does sparse prefill lose needles? needle-llama on its own tasks, dense against the presets.

    python benchmarks/needle_accuracy.py --lengths 2048 4096 8192 --questions 210

Every question is answered greedily with dense decode; a score is RULER's (all references, or any one). Answers are appended
to benchmarks/results/needle_accuracy.jsonl as they come, so a run that was stopped goes on where it was; the summary, with 95%
intervals, goes to needle_accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from typing import Any

from common import NEEDLE_LLAMA, RESULTS, plain, stamp_of_backend, write_result
from losses import QUESTION_SEED, answer, questions
from workers import in_processes

from unisparse_np.config import PRESETS

CONFIGS: dict[str, Any] = {"dense": "dense"} | {name: preset() for name, preset in PRESETS.items()}
ANSWERS = RESULTS / "needle_accuracy.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--questions", type=int, default=210, help="per length, spread over the tasks")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    parser.add_argument("--workers", type=int, default=1, help="questions asked at once, each in a process of its own")
    options = parser.parse_args()
    done = read_answers()
    jobs = [
        (length, n, task, example, [name for name in options.configs if (length, n, name) not in done])
        for length in options.lengths
        for n, (task, example) in enumerate(questions(length, options.questions))
    ]
    jobs = [job for job in jobs if job[-1]]
    found = in_processes(answer_question, [(NEEDLE_LLAMA, job) for job in jobs], options.backend, options.workers)
    for count, records in enumerate(found, start=1):
        done |= {(r["length"], r["question"], r["config"]): r for r in records}
        with ANSWERS.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        if count % 10 == 0:
            print(f"{count} of {len(jobs)} questions", flush=True)
    records = [r for r in done.values() if r["length"] in options.lengths and r["question"] < options.questions]
    summary = summarise(records)
    where = {"stamp": stamp_of_backend(options.backend), "backend": options.backend, "configs": plain(CONFIGS)}
    path = write_result("needle_accuracy", {**where, "seed": QUESTION_SEED, "model": "examples/needle-llama", "decode": "dense", **summary})
    for row in summary["rows"]:
        kept = f"{row['accuracy']:.3f} ± {row['interval_95']:.3f}, {row['share_of_dense']:.3f} of dense"
        print(f"{row['length']:6d} {row['config']:8s} {kept}, density {row['density']:.3f}")
    print(path)


def answer_question(model: Any, tokenizer: Any, job: tuple[int, int, str, tuple, list[str]]) -> list[dict[str, Any]]:
    """One question under several configs -> a record of score and density for each."""
    length, n, task, example, names = job
    return [
        {"length": length, "question": n, "task": task, "config": name, **answer(model, tokenizer, example, CONFIGS[name])}
        for name in names
    ]


def read_answers() -> dict[tuple[int, int, str], dict[str, Any]]:
    """What an earlier run left."""
    if not ANSWERS.exists():
        return {}
    records = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    return {(r["length"], r["question"], r["config"]): r for r in records}


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, its 95% interval, share of dense accuracy, density: a row per length and config, and per task."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    by_task: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for r in records:
        groups[r["length"], r["config"]].append(r)
        by_task[r["length"], r["task"], r["config"]].append(r["score"])
    rows = []
    for (length, name), group in sorted(groups.items(), key=lambda item: (item[0][0], list(CONFIGS).index(item[0][1]))):
        mean = average(r["score"] for r in group)
        dense = average(r["score"] for r in groups[length, "dense"])
        variance = average((r["score"] - mean) ** 2 for r in group)
        rows.append({
            "length": length, "config": name, "questions": len(group), "accuracy": mean,
            "interval_95": 1.96 * math.sqrt(variance / len(group)), "share_of_dense": mean / dense,
            "density": average(r["density"] for r in group),
        })  # fmt: skip
    tasks = [
        {"length": length, "task": task, "config": name, "accuracy": average(scores), "questions": len(scores)}
        for (length, task, name), scores in sorted(by_task.items())
    ]
    return {"rows": rows, "tasks": tasks}


def average(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    main()

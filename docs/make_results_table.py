"""Write the measured tables of README.md, between its markers, from benchmarks/results/*.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: written by docs/make_results_table.py -->", "<!-- end of results -->"
NONE_YET = "None yet.\n\n"


Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """How one result is shown. columns: heading -> how to write it from a row; rows: where the rows are in the file."""

    question: str
    columns: dict[str, Callable[[Row], str]]
    rows: Callable[[dict[str, Any]], list[Row]] = lambda result: result["rows"]


def preset_rows(result: dict[str, Any]) -> list[Row]:
    """One row for each kind of text and preset."""
    return [{"text": kind, "preset": preset, **values} for kind, presets in result["presets"].items() for preset, values in presets.items()]


QUALITY_COLUMNS: dict[str, Callable[[Row], str]] = {
    "text": lambda row: row["text"],
    "preset": lambda row: row["preset"],
    "KL from dense, per token": lambda row: f"{row['kl']:.4f}",
    "same likeliest token": lambda row: f"{row['top1']:.3f}",
    "rise of the loss, nats": lambda row: f"{row['nll_rise']:+.4f}",
    "density": lambda row: f"{row['density']:.3f}",
}
TABLES = {
    "needle_accuracy": Table(
        "Does sparse attention lose needles? needle-llama on its own tasks, share of right answers",
        {
            "prompt tokens": lambda row: f"{row['length']:,}",
            "attention": lambda row: row["config"],
            "questions": lambda row: str(row["questions"]),
            "accuracy": lambda row: f"{row['accuracy']:.3f} ± {row['interval_95']:.3f}",
            "share of dense": lambda row: f"{row['share_of_dense']:.3f}",
            "density": lambda row: f"{row['density']:.3f}",
        },
    ),
    "smollm2_quality_4096": Table("What does it change in a real model? SmolLM2-135M-Instruct, 4,096 tokens", QUALITY_COLUMNS, preset_rows),
    "smollm2_quality_8192": Table("The same at 8,192 tokens", QUALITY_COLUMNS, preset_rows),
    "smollm2_prefill": Table(
        "How long does a prompt take on a CPU? SmolLM2-135M-Instruct in float32, beside transformers (SDPA) on as many threads",
        {
            "prompt tokens": lambda row: f"{row['length']:,}",
            "engine": lambda row: row["engine"],
            "seconds": lambda row: f"{row['seconds']:.2f}",
            "times transformers": lambda row: f"{row['ratio_to_transformers']:.2f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "peak memory, MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            "density": lambda row: f"{row['density']:.3f}",
        },
    ),
    "decode_speed": Table(
        "How fast is a generated token, and what grows with the context?",
        {
            "model": lambda row: row["model"],
            "decode attention": lambda row: row["decode_attention"],
            "context": lambda row: f"{row['context']:,}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
            "a step, ms": lambda row: f"{row['step_ms']:.2f}",
            "attention in it, ms": lambda row: f"{row['attention_ms']:.2f}",
        },
        lambda result: [row for row in result["rows"] if row["context"] in (128, 2048, 8000)],
    ),
}


def with_results(readme: str) -> str:
    """The README with one table for each result that is there, in the order of TABLES."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md lacks the line {START!r} or {END!r}")
    tables = [shown(name, table) for name, table in TABLES.items() if (RESULTS / f"{name}.json").exists()]
    return f"{before}{START}\n\n{''.join(tables) or NONE_YET}{END}{after}"


def shown(name: str, table: Table) -> str:
    """One result: its question, its rows, and where it was measured."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(write(row) for write in table.columns.values()) + " |" for row in table.rows(result)]
    cpu, stamp = result["stamp"]["cpu"], result["stamp"]
    source = f"[`{name}.json`](benchmarks/results/{name}.json)"
    where = f"{cpu['name']}, {cpu['cores']} cores, NumPy {stamp['versions']['numpy']}"
    caption = f"Measured {stamp['date']} on {where}: {source}, by `{stamp['command']}`."
    return f"**{table.question}**\n\n" + "\n".join(lines) + f"\n\n{caption}\n\n"


if __name__ == "__main__":
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")

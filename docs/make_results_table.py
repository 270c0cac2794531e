"""Write the measured tables of README.md, between its markers, from benchmarks/results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: written by docs/make_results_table.py -->", "<!-- end of results -->"


def with_results(readme: str) -> str:
    """The README with one table for each result, in the order of the files' names."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    if not rest or END not in readme:
        raise ValueError(f"README.md lacks the line {START!r} or {END!r}")
    tables = [table(path) for path in sorted(RESULTS.glob("*.json"))]
    return f"{before}{START}\n\n{''.join(tables)}{END}{after}"


def table(path: Path) -> str:
    """One result: its question, its rows, and where it was measured."""
    result = json.loads(path.read_text(encoding="utf-8"))
    columns = list(result["rows"][0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in result["rows"]]
    source = f"benchmarks/results/{path.name}"
    caption = f"{result['note']} Measured {result['date']} on {machine(result)}: [`{path.name}`]({source}).".lstrip()
    return f"**{result['question']}**\n\n" + "\n".join(lines) + f"\n\n{caption}\n\n"


def cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    gpus = "".join(f", {gpu['name']}" for gpu in facts["gpus"])
    return f"{facts['processor']['name']}, {facts['processor']['cores']} cores{gpus}"


if __name__ == "__main__":
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")

"""How a result of benchmarks/results becomes a table: its question, its rows, and where it was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GPU = "nvidia_h200"  # whose results are shown

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Table:
    """How one result is shown.

    columns: heading -> how to write it from a row; rows: where the rows are in the file; others: files that rows take figures from too.
    """

    question: str
    columns: Columns
    rows: Callable[[dict[str, Any]], list[Row]] = lambda result: result["rows"]
    others: tuple[str, ...] = ()


def has_result(name: str) -> bool:
    """Whether a benchmark has left this file."""
    return (RESULTS / f"{name}.json").exists()


def result_of(name: str) -> dict[str, Any]:
    """What a benchmark has left."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def shown(name: str, table: Table, root: str) -> str:
    """One result: its question, its rows, and where it was measured; root leads from the page to the top of the project."""
    return (
        f"**{table.question}**\n\n{grid(table.columns, table.rows(result_of(name)))}\n"
        + "\n".join(captions([name, *table.others], root))
        + "\n\n"
    )


def grid(columns: Columns, rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(write(row) for write in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def captions(names: list[str], root: str) -> list[str]:
    """When, where and by which command results were measured: one sentence for those of one run."""
    runs: dict[tuple[str, str], list[str]] = {}
    for name in names:
        result = result_of(name)
        stamp = result.get("stamp", result)
        runs.setdefault((where_of(result, stamp), command_of(stamp)), []).append(f"[`{name}.json`]({root}benchmarks/results/{name}.json)")
    return [f"Measured {where}: {', '.join(files)}, by `{command}`." for (where, command), files in runs.items()]


def where_of(result: dict[str, Any], stamp: dict[str, Any]) -> str:
    """The day, the machine, and the versions that matter for speed."""
    versions = stamp["versions"]
    where = f"{stamp['date']} on {machine_of(result)}, NumPy {versions['numpy']}"
    return where + "".join(f", {library} {versions[library]}" for library in ("cupy-cuda13x", "numba-cuda") if library in versions)


def command_of(stamp: dict[str, Any]) -> str:
    """The command of a run, without a list of rules."""
    command, rules, _ = stamp["command"].partition(" --rules ")
    return command + (" --rules …" if rules else "")


def machine_of(result: dict[str, Any]) -> str:
    """The GPU of a run, or its GPUs, or its processor where it had none."""
    stamp = result.get("stamp", result)
    names = [part["device"] for part in (result, stamp, *result.get("rows", ())) if "device" in part]
    names += [gpu["name"] for gpu in stamp.get("gpus", ())]
    if not names:
        return f"{stamp['cpu']['name']}, {stamp['cpu']['cores']} cores"
    count = result["gpus"] if isinstance(result.get("gpus"), int) else 1
    return str(names[0]) if count == 1 else f"{count} × {names[0]}"


def number(name: str, form: str) -> Callable[[Row], str]:
    """A column: a number of the row, or nothing where it has none."""
    return lambda row: "" if row.get(name) is None else format(row[name], form)


def text(name: str) -> Callable[[Row], str]:
    """A column: a word of the row."""
    return lambda row: str(row[name])


def with_interval(name: str, ends: str, form: str) -> Callable[[Row], str]:
    """A column: a number of the row and the two ends of its 95% interval."""
    return lambda row: f"{row[name]:{form}} [{row[ends][0]:{form}}, {row[ends][1]:{form}}]"

"""From records of a results file to rows of figures with intervals, and to tables of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .intervals import Estimate, mean_estimate, ratio_estimate, share_estimate

Record = dict[str, Any]
Row = dict[str, Any]


def summarise(suite: str, records: Sequence[Record]) -> dict[str, Any]:
    """Rows of figures: `rows` (one a length and config) and `details` (by task, or by position for text). No record: no rows."""
    make = {"text": _text_row, "copy": _copy_row}.get(suite, _question_row)
    lengths = sorted({record["length"] for record in records})
    groups = [[record for record in records if record["length"] == length] for length in lengths]
    rows = [_heading(group, label) | make(group, label) for group in groups for label in group[0]["configs"]]
    return {"rows": rows, "details": [detail for group in groups for detail in _details(suite, group)]}


def as_tables(suite: str, summary: dict[str, Any]) -> str:
    """The summary for people: figures with their 95% intervals."""
    if not summary["rows"]:
        return "no example was measured"
    columns, detail = _COLUMNS.get(suite, _COLUMNS["questions"]), "position" if suite == "text" else "task"
    with_length = len({row["length"] for row in summary["rows"]}) > 1 or summary["rows"][0]["length"] > 0
    heads = (["length"] if with_length else []) + ["config", "n", *(name for name, _, _ in columns)]
    body = [
        ([f"{row['length']:,}"] if with_length else []) + [row["config"], str(row["n"]), *(show(row[field]) for _, field, show in columns)]
        for row in summary["rows"]
    ]
    tables = [table(heads, body)]
    if summary["details"]:
        tables.append(_detail_table(summary["details"], detail))
    return "\n\n".join(tables)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first left, numbers right."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [
            cell.ljust(width) if heads[n] in _LEFT else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


_LEFT = {"config", "task", "position", "rule"}


# ---- one row: every figure an Estimate as [value, low, high], which JSON can hold ----


def _heading(group: list[Record], label: str) -> Row:
    return {
        "length": group[0]["length"], "config": label, "n": len(group), "density": float(np.mean(_values(group, label, "density"))),
    }  # fmt: skip


def _question_row(group: list[Record], label: str) -> Row:
    scores, dense = _values(group, label, "score"), _values(group, "dense", "score")
    return {
        "score": _plain(share_estimate(scores)),
        "share_of_dense": _plain(ratio_estimate(scores, dense)),
        "prefill_seconds": float(np.mean(_values(group, label, "prefill_seconds"))),
    }


def _text_row(group: list[Record], label: str) -> Row:
    half = slice(5, 10)  # deciles of the second half, where there is something to leave out

    def of_second_half(name: str, of: str = label) -> list[float]:
        return [float(np.mean(deciles[half])) for deciles in _values(group, of, name)]

    nll, dense_nll = of_second_half("nll"), of_second_half("nll", "dense")
    return {
        "kl": _plain(mean_estimate(of_second_half("kl"), lowest=0.0)),
        "top1": _plain(mean_estimate(of_second_half("top1"), 0.0, 1.0)),
        "perplexity": math.exp(float(np.mean(nll))),
        "dense_perplexity": math.exp(float(np.mean(dense_nll))),
        "nll_rise": _plain(mean_estimate([a - b for a, b in zip(nll, dense_nll, strict=True)])),
    }


def _copy_row(group: list[Record], label: str) -> Row:
    nll, dense = _values(group, label, "nll"), _values(group, "dense", "nll")
    return {
        "nll": _plain(mean_estimate(nll, lowest=0.0)),
        "nll_rise": _plain(mean_estimate([a - b for a, b in zip(nll, dense, strict=True)])),
        "exact": _plain(share_estimate(_values(group, label, "exact"))),
        "right_in_a_row": float(np.mean(_values(group, label, "right_in_a_row"))),
    }


def _details(suite: str, group: list[Record]) -> list[Row]:
    """One row a task with each config's mean score, or a row a decile with each config's mean KL."""
    labels = list(group[0]["configs"])
    if suite == "text":
        kl = {label: np.mean(_values(group, label, "kl"), axis=0) for label in labels if label != "dense"}
        return [
            {"length": group[0]["length"], "position": f"{10 * n}-{10 * n + 10}%", "n": len(group), "figure": "KL",
             "configs": {label: float(values[n]) for label, values in kl.items()}}
            for n in range(10)
        ]  # fmt: skip
    tasks = list(dict.fromkeys(record["task"] for record in group))
    if len(tasks) < 2:
        return []
    of_task = {task: [record for record in group if record["task"] == task] for task in tasks}
    return [
        {"length": group[0]["length"], "task": task, "n": len(records), "figure": "score",
         "configs": {label: float(np.mean(_values(records, label, "score"))) for label in labels}}
        for task, records in of_task.items()
    ]  # fmt: skip


def _values(group: list[Record], label: str, name: str) -> list:
    return [record["configs"][label][name] for record in group]


def _plain(estimate: Estimate) -> list[float | None]:
    return [None if math.isnan(value) else value for value in estimate]


# ---- how figures look ----


def _interval(digits: int, scale: float = 1.0, unit: str = "") -> Callable[[list[float | None]], str]:
    def show(estimate: list[float | None]) -> str:
        value, low, high = estimate
        if value is None:
            return "-"
        text = f"{value * scale:.{digits}f}{unit}"
        return text if low is None or high is None else f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"

    return show


def _plain_number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


_COLUMNS: dict[str, tuple[tuple[str, str, Callable[[Any], str]], ...]] = {
    "questions": (
        ("score [95%]", "score", _interval(1, 100, "%")),
        ("of dense [95%]", "share_of_dense", _interval(1, 100, "%")),
        ("density", "density", _plain_number(3)),
        ("prefill s", "prefill_seconds", _plain_number(2)),
    ),
    "text": (
        ("KL [95%]", "kl", _interval(4)),
        ("top-1 agree [95%]", "top1", _interval(1, 100, "%")),
        ("perplexity", "perplexity", _plain_number(3)),
        ("dense", "dense_perplexity", _plain_number(3)),
        ("NLL rise [95%]", "nll_rise", _interval(4)),
        ("density", "density", _plain_number(3)),
    ),
    "copy": (
        ("NLL [95%]", "nll", _interval(3)),
        ("over dense [95%]", "nll_rise", _interval(3)),
        ("exact [95%]", "exact", _interval(0, 100, "%")),
        ("right in a row", "right_in_a_row", _plain_number(1)),
        ("density", "density", _plain_number(3)),
    ),
}


def _detail_table(details: list[Row], name: str) -> str:
    show = _plain_number(4) if details[0]["figure"] == "KL" else lambda value: f"{100 * value:.1f}%"
    several = len({row["length"] for row in details}) > 1
    heads = (["length"] if several else []) + [name, "n", *(details[0]["configs"])]
    body = [
        ([f"{row['length']:,}"] if several else []) + [row[name], str(row["n"]), *(show(value) for value in row["configs"].values())]
        for row in details
    ]
    return table(heads, body)

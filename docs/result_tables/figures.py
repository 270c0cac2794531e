"""How a measured figure is shown beside what was asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from result_tables.tables import Row, captions, grid, result_of

Values = tuple[float | None, ...]


@dataclass(frozen=True)
class Figure:
    """A thing that is measured, in one or several cases, and what was asked of each.

    sources: names of the result files; measured: the values from one result each, None for a case that the run left out;
    asked, goal: what was set beforehand as good enough, and as good; form: how a value is written.
    """

    work: str
    sources: tuple[str, ...]
    measured: Callable[..., Values]
    asked: tuple[float, ...]
    goal: tuple[float, ...]
    form: str = "{:.2f}"
    less_is_better: bool = False


def figure_table(question: str, figures: list[Figure]) -> str:
    """One row a figure, and where all of them were measured."""
    rows = [{"figure": figure, "values": figure.measured(*map(result_of, figure.sources))} for figure in figures]
    sources = dict.fromkeys(name for figure in figures for name in figure.sources)  # in order, each once
    return f"**{question}**\n\n{grid(FIGURE_COLUMNS, rows)}\n" + "\n".join(captions(list(sources), root="")) + "\n\n"


def written(form: str, values: Values) -> str:
    """Values side by side, or once if all are alike; a dash for one that was not measured."""
    words = ["–" if value is None else form.format(value) for value in values]
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def reached(row: Row) -> str:
    """Whether every case reaches its goal, or what was asked at least."""
    figure, values = row["figure"], row["values"]
    if None in values:
        return "not measured"
    for asked, verdict in ((figure.goal, "goal"), (figure.asked, "yes")):
        pairs = list(zip(values, asked, strict=True))
        if all(value <= bound if figure.less_is_better else value >= bound for value, bound in pairs):
            return verdict
    return "**no**"


FIGURE_COLUMNS: dict[str, Callable[[Row], str]] = {
    "work": lambda row: row["figure"].work,
    "measured": lambda row: written(row["figure"].form, row["values"]),
    "asked": lambda row: written(row["figure"].form, row["figure"].asked),
    "goal": lambda row: written(row["figure"].form, row["figure"].goal),
    "reached": reached,
}


def value(result: dict[str, Any], key: str, **wanted: Any) -> float | None:
    """A number of the one row that has these entries."""
    found: Row = next((row for row in result["rows"] if all(row.get(name) == entry for name, entry in wanted.items())), {})
    return found.get(key)


def ratio(top: float | None, bottom: float | None) -> float | None:
    """One measured number over another, if both are there."""
    return None if top is None or bottom is None else top / bottom

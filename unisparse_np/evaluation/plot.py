"""Pictures of a summary. matplotlib is loaded only here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, InvalidInput

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise before any work: InvalidInput for a name of another kind or folder, BackendUnavailable without matplotlib."""
    if path.suffix.lower() not in _FORMATS:
        raise InvalidInput(f"--plot {path} is no kind of picture: give a name that ends in {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise InvalidInput(f"--plot {path}: the folder {path.parent} does not exist: make it, or name another")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise BackendUnavailable("--plot needs matplotlib, which is not installed: pip install 'unisparse-np[plot]'") from None


def plot_summary(suite: str, summary: dict[str, Any], path: Path) -> None:
    """Draw the summary and write it to `path`, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    if suite == "text":
        _draw_by_position(axes, summary["details"])
    else:
        _draw_rows(axes, summary["rows"], *_BARS.get(suite, _BARS["questions"]))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper left")
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
    os.replace(temporary, path)


_BARS = {"questions": ("score", "score (RULER's string match)"), "copy": ("nll", "NLL of the quotation [nats per token]")}


def _draw_by_position(axes: Any, details: list[dict[str, Any]]) -> None:
    for label in details[0]["configs"]:
        middles = [10 * n + 5 for n in range(len(details))]
        axes.plot(middles, [row["configs"][label] for row in details], marker="o", label=label)
    axes.set(xlabel="position in the window [%]", xlim=(0, 100), ylabel="KL(dense || sparse) [nats per token]", yscale="log")


def _draw_rows(axes: Any, rows: list[dict[str, Any]], field: str, title: str) -> None:
    """Figure against density, one point a config and length, with its 95% interval."""
    for label in dict.fromkeys(row["config"] for row in rows):
        chosen = [row for row in rows if row["config"] == label]
        values = [row[field][0] for row in chosen]
        below = [0 if row[field][1] is None else row[field][0] - row[field][1] for row in chosen]
        above = [0 if row[field][2] is None else row[field][2] - row[field][0] for row in chosen]
        axes.errorbar([row["density"] for row in chosen], values, yerr=[below, above], fmt="o", capsize=3, label=label)
    axes.set(xlabel="density (dense is 1)", ylabel=title)

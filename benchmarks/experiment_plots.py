"""One picture of one to three panels, drawn from the rows of an experiment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")  # Okabe and Ito's, told apart by all


@dataclass(frozen=True)
class Panel:
    """Lines through points: label -> ([x], [y]). names: what stands beside each point of the first line, or nothing."""

    x: str
    y: str
    lines: dict[str, tuple[list[float], list[float]]]
    log: str = ""  # of "x", "y", "xy"
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """How to measure, and what to draw of the rows. configs: what the names in the rows stand for."""

    measure: Callable[[argparse.Namespace], list[dict[str, Any]]]
    panels: Callable[[list[dict[str, Any]]], list[Panel]]
    configs: dict[str, Any] = field(default_factory=dict)


def draw(panels: list[Panel], path: Path) -> Path:
    """Write the picture, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
    return path


def _draw_panel(axes: Any, panel: Panel) -> None:
    for colour, (label, (x, y)) in zip(COLOURS, panel.lines.items(), strict=False):
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=label)
    for name, x, y in zip(panel.names, *next(iter(panel.lines.values())), strict=False):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.margins(x=0.12)  # room for the names
    if "x" in panel.log:
        axes.set_xscale("log")
    elif panel.names:  # a cost: from nothing
        axes.set_xlim(left=0)
    if "y" in panel.log:
        axes.set_yscale("log")
    elif all(value >= 0 for _, y in panel.lines.values() for value in y):
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.lines) > 1:
        axes.legend(frameon=False, fontsize=8)

"""Write docs/selection_rules.md from the results of benchmarks/selection_rules.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from make_results_table import device_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "selection_rules.md"
OPENING = """# What each rule of selection costs a model

Written by `docs/make_selection_rules_page.py` from what `benchmarks/selection_rules.py` measured with this project's own code.
Unless a row says otherwise: block_size (S) 128, c_q = c_k = 8, first block and the block before the diagonal always kept, one
anchor key a block. tau is the row threshold, P is Top-P. Density counts anchors; selection is the share of dense attention's
products that choosing the blocks takes. Why the rules are what they are, and what else was tried:
[what_we_tried.md](what_we_tried.md).
"""

Row = dict[str, Any]


def interval(ends: list[float]) -> str:
    return f"[{ends[0]:.4f}, {ends[1]:.4f}]"


COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "text": {
        "rule": lambda row: row["rule"],
        "KL from dense, per token [95%]": lambda row: f"{row['kl']:.4f} {interval(row['kl_interval'])}",
        "same likeliest token": lambda row: f"{row['top1']:.3f}",
        "rise of the loss, nats": lambda row: f"{row['nll_rise']:+.4f}",
        "density": lambda row: f"{row['density']:.3f}",
        "selection": lambda row: f"{row['selection']:.3f}",
    },
    "needles": {
        "rule": lambda row: row["rule"],
        "share of dense accuracy [95%]": lambda row: f"{row['share_of_dense']:.3f} {interval(row['share_interval'])}",
        "answers worse than dense": lambda row: f"{row['worse_than_dense']} of {row['items']}",
        "density": lambda row: f"{row['density']:.3f}",
        "selection": lambda row: f"{row['selection']:.3f}",
    },
}
TITLES = {
    "text": "SmolLM2-135M-Instruct, {length:,} tokens: {items} windows of prose and code",
    "needles": "needle-llama, {length:,} tokens: {items} questions of its 14 tasks",
}


def page() -> str:
    """A section for each result that is there: text before needles, short before long."""
    return OPENING + "".join(section(json.loads(path.read_text())) for kind in COLUMNS for path in results_of(kind))


def results_of(kind: str) -> list[Path]:
    return sorted(RESULTS.glob(f"selection_rules_{kind}_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))


def section(result: dict[str, Any]) -> str:
    columns, rows, stamp = COLUMNS[result["kind"]], result["rows"], result["stamp"]
    title = TITLES[result["kind"]].format(length=result["length"], items=max(row["items"] for row in rows))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(write(row) for write in columns.values()) + " |" for row in rows]
    where = device_of(stamp) or f"{stamp['cpu']['name']}, {stamp['cpu']['cores']} cores"
    return f"\n## {title}\n\n" + "\n".join(lines) + f"\n\nMeasured {stamp['date']} on {where}, by `{stamp['command']}`.\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

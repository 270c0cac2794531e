"""Write docs/selection_rules.md from the results of benchmarks/selection_rules.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from result_tables.prototype import MEASURES, agreement_of, in_words
from result_tables.tables import Columns, Row, command_of, grid, machine_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "selection_rules.md"
OPENING = """# What each rule of selection costs a model

Written by `docs/make_selection_rules_page.py` from what `benchmarks/selection_rules.py` measured with this project's own code.
Unless a row says otherwise: block_size (S) 128, c_q = c_k = 8, first block and the block before the diagonal always kept, one
anchor key a block. tau is the row threshold, P is Top-P; "c 8, P .95 or c_q 4, c_k 2, tau .02" is the union of both rules, each
on composites of its own; "per head" are values that `benchmarks/head_values.py` fitted to SmolLM2's heads on windows between these.
Density counts anchors; selection is the share of dense attention's products that choosing the blocks takes; [ ] are 95% intervals.
Why the rules are what they are, and what else was tried: [what_we_tried.md](what_we_tried.md).

*Prototype* is what a PyTorch version of [ALGORITHM.md](../ALGORITHM.md) measured on one H100 before this code was there, on other
windows (prose, plays, policy text and code; 12, or 2 where marked °) and other questions:
[selection_rules_prototype.json](../benchmarks/results/selection_rules_prototype.json). Its figure is a mean over a sample of its own, so
the two agree where their difference could be chance: where it is at most half the width of our interval times sqrt(1 + n / m), for means
over n items here and m there that spread alike (24 quotations: its record does not say how many). In **bold** where it is more, in
*italics* where it only lies outside our own interval.
"""


def interval(ends: list[float], form: str) -> str:
    """The two ends of an interval as the tables write it."""
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def earlier(form: str) -> Callable[[Row], str]:
    """The prototype's figure, if it has one, and its density."""

    def write(row: Row) -> str:
        agreement = row["agreement"]
        if agreement is None:
            return ""
        figure = f"{agreement.prototype:{form}}" + ("°" if row["prototype"]["items"] == 2 else "")
        mark = "" if agreement.inside_ours else "*" if agreement.agrees else "**"
        density = row["prototype"].get("density")
        return f"{mark}{figure}{mark}" + (f" at {density:.3f}" if density is not None else "")

    return write


def of_text(kind: str) -> Callable[[Row], str]:
    """A column: the KL over windows of one kind of text, in nats per token."""
    return lambda row: f"{row['kl_by_text'][kind]:.4f}"


TEXTS = ("prose", "code", "plays", "licences")
COLUMNS: dict[str, Columns] = {
    "text": {
        "rule": lambda row: row["rule"],
        "KL from dense, per token": lambda row: f"{row['kl']:.4f} {interval(row['kl_interval'], '.4f')}",
        **{kind: of_text(kind) for kind in TEXTS},
        "same likeliest token": lambda row: f"{row['top1']:.3f}",
        "rise of the loss, nats": lambda row: f"{row['nll_rise']:+.4f}",
        "density": lambda row: f"{row['density']:.3f}",
        "selection": lambda row: f"{row['selection']:.3f}",
        "prototype": earlier(".4f"),
    },
    "copy": {
        "rule": lambda row: row["rule"],
        "NLL of a quotation over dense, per token": lambda row: f"{row['nll_over_dense']:+.4f} {interval(row['nll_interval'], '+.4f')}",
        "all 32 tokens right": lambda row: f"{row['exact']:.3f} (dense {row['exact_dense']:.3f})",
        "density": lambda row: f"{row['density']:.3f}",
        "selection": lambda row: f"{row['selection']:.3f}",
        "prototype": earlier("+.3f"),
    },
    "needles": {
        "rule": lambda row: row["rule"],
        "share of dense accuracy": lambda row: f"{row['share_of_dense']:.3f} {interval(row['share_interval'], '.3f')}",
        "on the tasks that dense solves": lambda row: (
            f"{row['share_on_solved_tasks']:.3f} {interval(row['share_on_solved_interval'], '.3f')}"
        ),
        "answers worse than dense": lambda row: f"{row['worse_than_dense']} of {row['items']}",
        "density": lambda row: f"{row['density']:.3f}",
        "selection": lambda row: f"{row['selection']:.3f}",
        "prototype": earlier(".3f"),
    },
}
TITLES = {
    "text": "SmolLM2-135M-Instruct, {length:,} tokens: {items} windows of {texts}",
    "copy": "SmolLM2-135M-Instruct, {length:,} tokens: {items} quotations of 32 tokens from far back, after a cue of 48",
    "needles": "needle-llama, {length:,} tokens: {items} questions of its 14 tasks",
}


def page() -> str:
    """A section for each result that is there: text, quotations, needles; short before long."""
    prototype = json.loads((RESULTS / "selection_rules_prototype.json").read_text(encoding="utf-8"))
    return OPENING + "".join(
        section(json.loads(path.read_text(encoding="utf-8")), prototype[kind]) for kind in COLUMNS for path in results_of(kind)
    )


def results_of(kind: str) -> list[Path]:
    """The result files of one kind, shortest prompts first."""
    return sorted(RESULTS.glob(f"selection_rules_{kind}_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))


def section(result: dict[str, Any], prototype: dict[str, dict[str, Row]]) -> str:
    """The page's section of one result: its title, its table, and how it was measured."""
    kind = result["kind"]
    found = prototype.get(str(result["length"]), {})
    rows = [row | {"prototype": found.get(row["rule"])} for row in result["rows"]]
    rows = [row | {"agreement": agreement_of(row, row["prototype"], MEASURES[kind])} for row in rows]
    texts = texts_of(rows)
    columns = {name: write for name, write in COLUMNS[kind].items() if name not in TEXTS or name in texts}
    words = " and ".join([", ".join(texts[:-1]), texts[-1]]) if texts else ""
    title = TITLES[kind].format(length=result["length"], items=max(row["items"] for row in rows), texts=words)
    text = f"\n## {title}\n\n{grid(columns, rows)}\n" + in_words({row["rule"]: row["agreement"] for row in rows if row["agreement"]})
    text += f"Measured {result['stamp']['date']} on {machine_of(result)}, by `{command_of(result['stamp'])}`.\n"
    return text + (solved_tasks(result) if kind == "needles" else "")


def texts_of(rows: list[Row]) -> list[str]:
    """The kinds of text that every row was measured on."""
    return [kind for kind in TEXTS if all(kind in row.get("kl_by_text", {}) for row in rows)]


def solved_tasks(result: dict[str, Any]) -> str:
    """Which tasks dense attention itself has right, by how much."""
    tasks = result["dense_by_task"]
    unsolved = ", ".join(f"`{task}` {share:.2f}" for task, share in tasks.items() if share < result["solved"])
    if not unsolved:
        return f"Dense attention solves every task to {result['solved']:.0%} at least.\n"
    return f"Tasks count as solved where dense attention has {result['solved']:.0%} right; left out there: {unsolved}.\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
